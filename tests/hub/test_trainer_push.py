"""`NCTrainer` and the Hub: clean folders, failures said aloud, and new models from released ones."""

from __future__ import annotations

import json
import logging
import threading

import pytest
import torch
from small_images import SmallImages
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from nc_hf import (
    NCTrainer,
    NCTrainingArguments,
    load_classifier,
    load_pretrained,
    publishing,
    push_folder,
    save_pretrained,
    saving_trainer,
)
from nc_hf.metrics import compute_metrics_for
from nc_hf.publishing import PushError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(publishing, "WAITS", (0, 0, 0))


def trainer(folder, repo_id, model=None, **settings) -> NCTrainer:
    images = SmallImages()
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 54, "save_strategy": "no", "precision": "fp32"}
    defaults |= {"report_to": "none", "disable_tqdm": True, "hub_model_id": repo_id}
    args = NCTrainingArguments(str(folder), **defaults | settings)
    if model is None:
        model, _ = load_classifier("test_resnet", 4, images.class_names)
    metrics = compute_metrics_for(images.class_counts)
    return NCTrainer(model, args, train_dataset=images, eval_dataset=SmallImages(seed=1), compute_metrics=metrics)


def test_a_trained_model_is_pushed_with_its_card(hub, user, tmp_path, fresh_cache):
    run = trainer(tmp_path, f"{user}/trained")
    run.train()
    accuracy = run.evaluate()["eval_accuracy"]
    url = run.push_to_hub(license="mit", tags=["mine"], private=True)
    assert url.endswith(f"{user}/trained")
    files = hub.files(f"{user}/trained")
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "nc_heads.safetensors", "results.json"
    }  # fmt: skip
    card = files["README.md"].decode()
    assert "license: mit" in card and "- mine" in card and f"| {100 * accuracy:.1f} |" in card
    model, _ = load_pretrained(f"{user}/trained")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in run.classifier.state_dict().items())


def test_saves_are_pushed_in_the_background(hub, user, tmp_path):
    settings = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}
    run = trainer(tmp_path, f"{user}/often", save_strategy="epoch", **settings)
    run.train()
    assert not [name for name in hub.files(f"{user}/often") if name.endswith((".bin", ".pt", ".pth"))]
    titles = [commit["title"] for commit in hub.commits(f"{user}/often")]
    assert titles[:2] == ["Training in progress, step 4", "Training in progress, step 2"]


def test_a_background_push_that_fails_is_said_and_tried_again_at_the_end(hub, user, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    hub.fail(lambda request: "/commit/" in request.path, status=403, times=1)
    run = trainer(
        tmp_path, f"{user}/second", push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=4
    )
    run.train()
    hub.heal()
    assert f"in the background, the push to {user}/second failed" in caplog.text
    assert [commit["title"] for commit in hub.commits(f"{user}/second")][0] == "End of training"


def test_a_push_that_fails_to_the_end_raises_after_everything_is_saved(hub, user, tmp_path):
    hub.fail(lambda request: "/commit/" in request.path, status=403, times=1000)
    run = trainer(tmp_path, f"{user}/never", push_to_hub=True, hub_strategy="every_save", save_strategy="epoch")
    with pytest.raises(PushError, match="Push it later with"):
        run.train()
    hub.heal()
    assert run.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "complete.json").is_file()
    saved, _ = load_pretrained(tmp_path / "hub")
    assert all(torch.equal(t, saved.state_dict()[n]) for n, t in run.classifier.state_dict().items())


def test_a_background_push_opens_the_doors_and_leaves_training_alone(hub, user, tmp_path, monkeypatch):
    threads, check = [], publishing.check_doors

    def watched(folder):
        threads.append(threading.current_thread())
        return check(folder)

    monkeypatch.setattr(publishing, "check_doors", watched)
    weights = []
    for name in ("pushed", "quiet"):
        torch.manual_seed(0)
        model, _ = load_classifier("test_vit", 4, drop_rate=0.5)
        settings = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "epoch"}
        run = trainer(tmp_path / name, f"{user}/doors", model, **(settings if name == "pushed" else {}))
        run.train()
        weights.append(model.state_dict())
    assert threads == [threading.main_thread()] * 2
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_last_save_is_pushed_at_the_end_when_the_push_before_was_still_running(hub, user, tmp_path, monkeypatch):
    trained, push = threading.Event(), publishing.push_folder

    def slow(*args, **options):
        trained.wait(60)
        return push(*args, **options)

    class Trained(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trained.set()

    monkeypatch.setattr(saving_trainer, "push_folder", slow)
    run = trainer(tmp_path, f"{user}/left-out", push_to_hub=True, hub_strategy="every_save", save_strategy="epoch")
    run.add_callback(Trained())
    run.train()
    assert [commit["title"] for commit in hub.commits(f"{user}/left-out")] == [
        "End of training",
        "Training in progress, step 2",
        "initial commit",
    ]
    pushed, _ = load_pretrained(f"{user}/left-out")
    assert all(torch.equal(t, pushed.state_dict()[n]) for n, t in run.classifier.state_dict().items())


def test_a_folder_that_does_not_open_is_said_at_once_and_at_the_end(hub, user, tmp_path, monkeypatch, caplog):
    def shut(folder):
        raise RuntimeError("hub does not open through timm")

    monkeypatch.setattr(publishing, "check_doors", shut)
    run = trainer(tmp_path, f"{user}/shut", push_to_hub=True, hub_strategy="every_save", save_strategy="epoch")
    with pytest.raises(PushError, match="(?s)does not open through timm.*Once that is mended"):
        run.train()
    assert run.state.global_step == 4 and "in the background" in caplog.text
    future = run.push_to_hub(blocking=False)
    assert isinstance(future.exception(), PushError)


def test_a_push_that_is_not_waited_for_logs_its_failure(hub, user, tmp_path, caplog):
    run = trainer(tmp_path, f"{user}/unwaited")
    hub.fail(lambda request: f"{user}/unwaited/commit/" in request.path, status=403, times=1000)
    future = run.push_to_hub(blocking=False, private=True)
    with pytest.raises(PushError, match="Push it later with.*\n.*private=True"):
        future.result()
    run._pusher.shutdown()  # the failure is logged after it is known
    hub.heal()
    assert "in the background, the push to" in caplog.text


def test_a_model_of_transformers_needs_its_image_processor_before_training(hub, user, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4))
    with pytest.raises(PushError, match="ViTForImageClassification cannot be pushed without its image processor"):
        trainer(tmp_path, f"{user}/native", model, push_to_hub=True)
    with pytest.raises(PushError, match="(?s)is not pushed to.*preprocessor_config.*Once that is mended"):
        push_folder(save_pretrained(model, tmp_path / "native"), f"{user}/native")


def test_the_card_states_the_figures_of_the_weights_that_are_pushed(hub, user, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.2, 0.1])  # the first epoch is the best one
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    run = trainer(tmp_path, f"{user}/best", **settings, num_train_epochs=3, metric_for_best_model="accuracy")
    run.compute_metrics = lambda _: {"accuracy": next(accuracies)}
    run.train()
    run.push_to_hub()
    results = json.loads(hub.files(f"{user}/best")["results.json"])
    assert (results["epoch"], results["heads"]["base"]["accuracy"]) == (1, 0.9)
    card = hub.files(f"{user}/best")["README.md"].decode()
    assert "after epoch 1" in card and "last epoch" not in card


def test_figures_of_other_weights_are_left_out(hub, user, tmp_path):
    run = trainer(tmp_path, f"{user}/moved", eval_strategy="steps", eval_steps=3)
    run.train()
    run.state.log_history = [log for log in run.state.log_history if log["step"] == 3 or "train_runtime" in log]
    assert any("eval_accuracy" in log for log in run.state.log_history)
    run.push_to_hub()
    assert "heads" not in json.loads(hub.files(f"{user}/moved")["results.json"])


def test_class_names_of_a_timm_model_reach_the_card(hub, user, tmp_path):
    run = trainer(tmp_path, f"{user}/named", load_classifier("test_resnet", 4, ["w", "x", "y", "z"])[0])
    run.class_names = None
    run.push_to_hub(tags="mine")
    assert json.loads(hub.files(f"{user}/named")["results.json"])["dataset"]["class_names"] == ["w", "x", "y", "z"]
    assert "- mine\n" in hub.files(f"{user}/named")["README.md"].decode()


def test_saving_pushes_where_the_arguments_say_so(hub, user, tmp_path):
    run = trainer(tmp_path, f"{user}/saved", push_to_hub=True, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert "model.safetensors" in hub.files(f"{user}/saved")


def test_a_push_that_cannot_succeed_stops_before_training(hub, tmp_path):
    with pytest.raises(PushError, match="the token is for alice"):
        trainer(tmp_path, "somebody/else", push_to_hub=True)


def test_the_token_is_in_no_file(hub, user, tmp_path):
    settings = {"hub_token": hub.token, "push_to_hub": True, "save_strategy": "epoch"}
    run = trainer(tmp_path, f"{user}/quiet-trainer", **settings)
    run.train()
    run.push_to_hub()
    assert run.args.hub_token == hub.token
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if hub.token.encode() in path.read_bytes()]


def test_checkpoints_are_never_uploaded(hub, user, tmp_path):
    with pytest.raises(ValueError, match="need pickle to load. Use every_save or end"):
        trainer(tmp_path, f"{user}/model", push_to_hub=True, hub_strategy="checkpoint")


@pytest.fixture(scope="module")
def released(hub, user, tmp_path_factory) -> str:
    """A repository with a network of another number of classes."""
    model, _ = load_classifier("test_resnet", 7)
    push_folder(save_pretrained(model, tmp_path_factory.mktemp("released") / "model"), f"{user}/released")
    return f"{user}/released"


def test_our_trainer_starts_from_a_repository_with_another_number_of_classes(released, tmp_path, fresh_cache, caplog):
    caplog.set_level(logging.INFO)
    model, _ = load_classifier(released, 4)
    assert "has 7 outputs; one with 4 is drawn anew" in caplog.text
    run = trainer(tmp_path, None, model)
    run.train()
    assert run.state.log_history[-1]["train_loss"] > 0


def test_plain_trainer_starts_from_it_too(released, tmp_path, fresh_cache):
    model = AutoModelForImageClassification.from_pretrained(released, num_labels=4, ignore_mismatched_sizes=True)
    before = {name: tensor.clone() for name, tensor in model.timm_model.state_dict().items()}
    for name, tensor in load_pretrained(released)[0].state_dict().items():
        assert torch.equal(before[name], tensor) or name.startswith("fc."), name
    assert before["fc.weight"].shape[0] == 4
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    images = SmallImages()
    rows = [images.__getitems__([k]) for k in range(len(images))]
    rows = [{"pixel_values": row["pixel_values"][0], "labels": row["labels"][0]} for row in rows]
    assert Trainer(model, args, train_dataset=rows).train().training_loss > 0
    assert not torch.equal(model.timm_model.fc.weight, before["fc.weight"])


def test_a_recipe_pushes_what_it_trained_and_again_when_the_push_fails(
    hub, user, tmp_path, script, monkeypatch, capsys, caplog
):
    monkeypatch.chdir(tmp_path)
    hub.fail(lambda request: f"{user}/digits/commit/" in request.path, status=403, times=1000)
    epochs = ["--stage1.num_train_epochs", "2", "--stage2.num_train_epochs", "1"]
    recipe = [*epochs, "--hub.repo_id", f"{user}/digits"]
    with pytest.raises(SystemExit, match="Push it later with"), caplog.at_level("INFO"):
        script("train").main(recipe)
    assert "epochs of" in caplog.text
    hub.heal()
    (release,) = tmp_path.glob("out/*/release")
    script("publish").main([str(release), f"{user}/digits-by-hand"])
    assert "figures/angles.png" in hub.files(f"{user}/digits-by-hand")
    caplog.clear()
    with caplog.at_level("INFO"):
        script("train").main(recipe)
    assert "epochs of" not in caplog.text  # trained once
    assert f"pushed: {hub.base}/{user}/digits" in capsys.readouterr().out
    files = hub.files(f"{user}/digits")
    assert {"figures/classes.png", "figures/angles.png", "recipe.yaml", "results.json"} <= set(files)
    assert b"digits-LT, imbalance ratio 20" in files["README.md"]
    assert not any(hub.token.encode() in content or str(tmp_path).encode() in content for content in files.values())
