"""Our own pushes: complete, in one commit, kind to a person's words, and honest when they fail."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import PIL.Image
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from nc_hf import publishing
from nc_hf.card_block import BEGIN
from nc_hf.doors import check_doors
from nc_hf.hub import load_pretrained, save_pretrained
from nc_hf.model_card import write_card
from nc_hf.models.classifier import load_classifier, logits_of
from nc_hf.publishing import PushError, check_access, push_folder
from nc_hf.results import write_results

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved timm network with results, as the Trainer API leaves one."""
    torch.manual_seed(0)
    model, _ = load_classifier("test_resnet", 4, NAMES)
    heads = {"base": model.fc.state_dict()}
    folder = save_pretrained(model, tmp_path / "model", heads=heads, class_counts=[9, 5, 3, 1])
    dataset = {"class_names": NAMES, "class_counts": [9, 5, 3, 1]}
    write_results(folder / "results.json", {"dataset": dataset, "seed": 0})
    write_card(folder, license="apache-2.0")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(publishing, "WAITS", (0, 0, 0))


def test_a_folder_is_pushed_in_one_commit(hub, user, folder):
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / ".hidden.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")  # as a Trainer's own output folder has them
    for name in ("checkpoint-4/model.safetensors", "hub/config.json", "figures/classes.png", "seeds/seed1.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"{}")
    url = push_folder(folder, f"{user}/one")
    assert url.endswith(f"{user}/one")
    files = hub.files(f"{user}/one")
    assert {"config.json", "model.safetensors", "nc_heads.safetensors", "results.json", "README.md"} <= set(files)
    assert {"figures/classes.png", "seeds/seed1.json"} <= set(files)
    assert not {"optimizer.pt", ".hidden.json", "trainer_state.json"} & set(files)
    assert not [name for name in files if name.startswith(("checkpoint-4", "hub"))]
    for name in ("model.safetensors", "nc_heads.safetensors", "config.json"):
        assert files[name] == (folder / name).read_bytes()
    assert f'timm.create_model("hf-hub:{user}/one", pretrained=True)' in files["README.md"].decode()
    commits = HfApi().list_repo_commits(f"{user}/one")
    assert [commit.title for commit in commits] == ["Upload model", "initial commit"]


def test_files_of_an_earlier_model_go(hub, user, folder):
    """The Hub's pipeline would prefer its image settings to those of a timm model, and its results would be read."""
    api = HfApi()
    api.create_repo(f"{user}/earlier")
    results = (".eval_results/cifar10.yaml", "twin.json", "seeds/seed1.json", "figures/angles.png")
    for name in ("preprocessor_config.json", "model-00001-of-00002.safetensors", *results, "figures/mine.png"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=f"{user}/earlier")
    push_folder(folder, f"{user}/earlier")
    there = set(hub.files(f"{user}/earlier"))
    assert "figures/mine.png" in there and not there & {"preprocessor_config.json", *results}
    assert not [name for name in there if name.startswith("model-")]


def test_a_push_of_the_same_again_makes_no_commit(hub, user, folder):
    push_folder(folder, f"{user}/again")
    push_folder(folder, f"{user}/again")
    assert len(HfApi().list_repo_commits(f"{user}/again")) == 2


def test_what_a_person_wrote_on_the_hub_stays(hub, user, folder):
    push_folder(folder, f"{user}/edited")
    text = hub.files(f"{user}/edited")["README.md"].decode()
    edited = text.replace(BEGIN, f"By hand.\n\n{BEGIN}").replace(
        "license: apache-2.0", "license: apache-2.0\nlanguage: en"
    )
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=f"{user}/edited")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=f"{user}/edited")
    results = {"dataset": {"class_names": NAMES, "class_counts": [90, 5, 3, 1]}, "seed": 0}
    write_results(folder / "results.json", results)
    push_folder(folder, f"{user}/edited")
    files = hub.files(f"{user}/edited")
    readme = files["README.md"].decode()
    assert "By hand." in readme and "language: en" in readme and "99 images, 90 to 1 a class" in readme
    assert files["notes.txt"] == b"mine"


@pytest.mark.parametrize("status", [403, 503])
def test_a_readme_that_cannot_be_read_is_not_replaced(hub, user, folder, fresh_cache, status, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between tries of its own
    name = f"{user}/unread{status}"
    push_folder(folder, name)
    HfApi().upload_file(path_or_fileobj=b"All by hand.", path_in_repo="README.md", repo_id=name)
    asked = f"/{name}/resolve/"
    before = len(hub.requests(asked))
    hub.fail(lambda request: request.method == "HEAD" and asked in request.path, status=status, times=1000)
    with pytest.raises(PushError, match=rf"(?s)README there cannot be read: .*{status}.*Push it later with"):
        push_folder(folder, name)
    hub.heal()
    tries = len(hub.requests(asked)) - before
    assert tries == 1 if status == 403 else tries > len(publishing.WAITS)
    assert hub.files(name)["README.md"] == b"All by hand."
    push_folder(folder, name)
    assert b"All by hand." in hub.files(name)["README.md"]


def test_results_that_are_gone_leave_the_metadata(hub, user, folder):
    facts = {"dataset": {"class_names": NAMES, "class_counts": [9, 5, 3, 1]}, "seed": 0}
    write_results(folder / "results.json", facts | {"heads": {"base": {"accuracy": 0.5}}})
    push_folder(folder, f"{user}/measured")
    assert b"model-index" in hub.files(f"{user}/measured")["README.md"]
    write_results(folder / "results.json", facts)
    push_folder(folder, f"{user}/measured")
    readme = hub.files(f"{user}/measured")["README.md"]
    assert b"model-index" not in readme and b"license: apache-2.0" in readme


def test_private_branch_and_pull_request(hub, user, folder):
    push_folder(folder, f"{user}/secret", private=True, revision="trial")
    assert HfApi().repo_info(f"{user}/secret").private
    assert "model.safetensors" in hub.files(f"{user}/secret", "trial")
    assert "model.safetensors" not in hub.files(f"{user}/secret")
    url = push_folder(folder, f"{user}/secret", create_pr=True)
    assert "/discussions/1" in url
    assert "model.safetensors" not in hub.files(f"{user}/secret")
    assert "model.safetensors" in hub.files(f"{user}/secret", "refs/pr/1")


def test_a_pull_request_that_is_open_gets_another_commit(hub, user, folder):
    push_folder(folder, f"{user}/reviewed")
    (folder / "notes.md").write_text("first")
    push_folder(folder, f"{user}/reviewed", create_pr=True)
    (folder / "notes.md").write_text("second")
    push_folder(folder, f"{user}/reviewed", revision="refs/pr/1")
    assert hub.files(f"{user}/reviewed", "refs/pr/1")["notes.md"] == b"second"
    assert "notes.md" not in hub.files(f"{user}/reviewed")


def test_a_fault_of_the_moment_is_retried(hub, user, folder):
    hub.fail(lambda request: "/commit/" in request.path, status=503, times=2)
    push_folder(folder, f"{user}/retried")
    assert "model.safetensors" in hub.files(f"{user}/retried")


def test_a_lasting_fault_ends_with_the_command_that_pushes_later(hub, user, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.fail(lambda request: "/commit/" in request.path, status=500, times=1000)
    with pytest.raises(PushError, match="Push it later with") as caught:
        push_folder(folder, f"{user}/later", private=True)
    tries = [request for request in hub.requests() if f"{user}/later/commit/" in request.path]
    assert len(tries) == 1 + len(publishing.WAITS)
    hub.heal()
    assert {path: path.read_bytes() for path in before} == before
    command = str(caught.value).splitlines()[-1].strip()
    assert (
        command == f"""python -c "import nc_hf; nc_hf.push_folder({str(folder)!r}, '{user}/later', private=True)\""""
    )
    exec(command.removeprefix('python -c "').removesuffix('"'))
    assert HfApi().repo_info(f"{user}/later").private and "model.safetensors" in hub.files(f"{user}/later")


def test_a_refusal_is_not_retried(hub, user, folder):
    push_folder(folder, f"{user}/refused")
    write_results(folder / "results.json", {"dataset": {"class_names": NAMES}, "seed": 1})
    hub.fail(lambda request: "/commit/" in request.path, status=403, times=1000)
    with pytest.raises(PushError, match="403"):
        push_folder(folder, f"{user}/refused")
    hub.heal()
    assert len([r for r in hub.requests() if f"{user}/refused/commit/" in r.path]) == 2


def test_a_commit_by_somebody_else_in_between_is_kept(hub, user, folder):
    push_folder(folder, f"{user}/raced")
    write_results(folder / "results.json", {"dataset": {"class_names": NAMES}, "seed": 1})
    raced = []

    def race(request) -> bool:
        if f"{user}/raced/commit/" in request.path and not raced:
            raced.append(True)
            hub.commit(f"{user}/raced", {"other.txt": b"first"}, "somebody else")
        return False

    hub.fail(race, status=500, times=1)
    push_folder(folder, f"{user}/raced")
    hub.heal()
    files = hub.files(f"{user}/raced")
    assert files["other.txt"] == b"first" and b'"seed": 1' in files["results.json"]


def test_a_server_killed_in_mid_upload_leaves_a_push_that_can_be_repeated(hub, user, folder):
    push_folder(folder, f"{user}/cut")
    head = HfApi().repo_info(f"{user}/cut").sha
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    killed = []

    def kill(request) -> bool:
        if request.path.startswith(("/lfs-content/put", "/v1/xorbs")) and not killed:
            killed.append(request.path)
            hub.kill()
        return False

    hub.fail(kill, status=500, times=1)
    with pytest.raises(PushError, match="Push it later with"):
        push_folder(folder, f"{user}/cut")
    assert killed
    hub.thread.join()
    hub.start(hub.port)
    assert HfApi().repo_info(f"{user}/cut").sha == head
    push_folder(folder, f"{user}/cut")
    assert hub.files(f"{user}/cut")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_two_pushes_at_once_both_arrive(hub, user, folder, tmp_path):
    errors = []

    def push(number: int) -> None:
        own = Path(shutil.copytree(folder, tmp_path / str(number)))
        (own / f"notes{number}.md").write_text("words")
        try:
            push_folder(own, f"{user}/twice", check=False)
        except PushError as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    files = hub.files(f"{user}/twice")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"notes0.md", "notes1.md"} <= set(files)


def test_a_folder_that_does_not_open_is_not_pushed(hub, user, folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(PushError, match="(?s)does not open through timm.*Once that is mended.*revision='trial'"):
        push_folder(folder, f"{user}/broken", revision="trial")
    assert not HfApi().repo_exists(f"{user}/broken")


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("nobody/model", None, "the token is for alice"),
        ("alice/a model!", None, "cannot push to alice/a model!"),
        ("alice/model", "tok-read", "the token may only read"),
        ("alice/model", "tok-wrong", "cannot push to alice/model"),
    ],
)
def test_access_is_checked_beforehand(hub, name, token, message):
    with pytest.raises(PushError, match=message):
        check_access(name, token=token)


def test_access_is_asked_again_after_a_fault_of_the_moment(hub, user):
    hub.fail(lambda request: request.path == "/api/whoami-v2", status=503, times=2)
    assert check_access("model") == f"{user}/model"


def test_without_a_network_there_is_no_waiting(monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="cannot push to alice/model"):
        check_access("alice/model")
    assert "trying again" not in caplog.text


def test_a_token_that_was_given_is_in_no_message():
    error = RuntimeError("Illegal header value: Bearer tok-given")
    assert publishing.reason_of(error, "tok-given") == "Illegal header value: Bearer <token>"
    error = ValueError("Illegal header value b'Bearer tok-given\\n'")  # of a token read from a file
    assert "tok-given" not in publishing.reason_of(error, "tok-given\n")


def test_a_bare_name_is_the_users_own(hub, user, folder):
    assert check_access("model") == f"{user}/model"
    assert push_folder(folder, "model", token=f" {hub.token}\n").endswith(f"{user}/model")


def test_the_token_is_in_no_message_and_no_file(hub, user, folder, caplog):
    caplog.set_level(logging.DEBUG)
    hub.fail(lambda request: "/commit/" in request.path, status=403, times=1000)
    with pytest.raises(PushError) as caught:
        push_folder(folder, f"{user}/quiet")
    hub.heal()
    token = hub.token
    assert token not in str(caught.value) and token not in caplog.text
    assert not any(token.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_one_command_pushes_every_released_model(hub, user, tmp_path, script, monkeypatch, capsys):
    released = {path.parent.name: path.parent for path in (ROOT / "model_cards").glob("*/config.json")}
    assert released
    monkeypatch.chdir(tmp_path)
    script("publish").main(["--all", "--private"])
    printed = capsys.readouterr().out
    for name, folder in released.items():
        assert f"{hub.base}/{user}/{name}" in printed
        files = hub.files(f"{user}/{name}")
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "README.md":
                assert files[path.relative_to(folder).as_posix()] == path.read_bytes()
        assert f'"{user}/{name}"' in files["README.md"].decode()


def test_every_door_opens_by_repository_id(hub, user, folder, fresh_cache):
    import timm
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    push_folder(folder, f"{user}/doors")
    name = f"{user}/doors"
    image = PIL.Image.effect_noise((40, 40), 64).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(name)(image, return_tensors="pt")["pixel_values"]
    doors = [
        timm.create_model(f"hf-hub:{name}", pretrained=True),
        AutoModelForImageClassification.from_pretrained(name),
        load_pretrained(name, head="base", revision="main")[0],
    ]
    with torch.no_grad():
        expected, *others = (logits_of(model.eval()(pixels)) for model in doors)
    for logits in others:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    answers = {answer["label"]: answer["score"] for answer in pipeline("image-classification", name)(image)}
    assert answers == {name: pytest.approx(expected.softmax(1)[0, k].item(), abs=1e-6) for k, name in enumerate(NAMES)}
    assert check_doors(folder)
