"""Accuracy by class frequency: the function, its `evaluate` module, and the Trainer's compute_metrics."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_hf.metrics import compute_metrics_for, expected_calibration_error, frequency_groups, long_tail_accuracy

COUNTS = [300, 101, 100, 20, 19, 0]


def slow_accuracy(predictions: list[int], references: list[int], counts: list[int], few: int, many: int) -> dict:
    """The definition, class by class in plain Python."""
    per_class = []
    for k in range(len(counts)):
        hits = [p == y for p, y in zip(predictions, references, strict=True) if y == k]
        per_class.append(sum(hits) / len(hits) if hits else None)
    expected = {"per_class_accuracy": per_class}
    expected["accuracy"] = sum(p == y for p, y in zip(predictions, references, strict=True)) / len(references)
    groups = {
        "class_mean_accuracy": lambda n: True,
        "accuracy_many": lambda n: n > many,
        "accuracy_medium": lambda n: few <= n <= many,
        "accuracy_few": lambda n: n < few,
    }
    for key, belongs in groups.items():
        scores = [a for a, n in zip(per_class, counts, strict=True) if a is not None and belongs(n)]
        if scores:
            expected[key] = sum(scores) / len(scores)
    return expected


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int, int]:
    counts = draw(st.lists(st.integers(0, 130), min_size=1, max_size=8))
    class_id = st.integers(0, len(counts) - 1)
    pairs = draw(st.lists(st.tuples(class_id, class_id), min_size=1, max_size=40))
    few = draw(st.integers(0, 60))
    return [p for p, _ in pairs], [y for _, y in pairs], counts, few, few + draw(st.integers(-1, 80))


@given(evaluations())
def test_equals_the_definition(evaluation: tuple) -> None:
    predictions, references, counts, few, many = evaluation
    result = long_tail_accuracy(predictions, references, counts, few_below=few, many_above=many)
    expected = slow_accuracy(predictions, references, counts, few, many)
    assert result.pop("per_class_accuracy") == expected.pop("per_class_accuracy")
    assert result == pytest.approx(expected)


@given(evaluations(), st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter(evaluation: tuple, random: object) -> None:
    predictions, references, counts, few, many = evaluation
    order = random.sample(range(len(predictions)), len(predictions))
    shuffled = [[values[i] for i in order] for values in (predictions, references)]
    whole = long_tail_accuracy(predictions, references, counts, few_below=few, many_above=many)
    assert long_tail_accuracy(*shuffled, counts, few_below=few, many_above=many) == whole


def test_golden(golden: Callable) -> None:
    full, with_empty_groups = golden("shot_accuracy")
    for case in (full, with_empty_groups):
        inputs, outputs = case["inputs"], case["outputs"]
        result = long_tail_accuracy(inputs["pred"], inputs["y"], inputs["train_counts"])
        assert result["per_class_accuracy"] == pytest.approx(outputs["per_class"])
        for group in ("many", "medium", "few"):
            # The reference reports 0 for a group without classes; here it is absent, since nothing was measured.
            assert result.get(f"accuracy_{group}", 0.0) == pytest.approx(outputs[group])
    assert "accuracy_medium" not in result and "accuracy_few" not in result


def test_group_borders() -> None:
    groups = {name: np.flatnonzero(members).tolist() for name, members in frequency_groups(COUNTS).items()}
    assert groups == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}


def test_group_absent_from_the_test_set_is_absent() -> None:
    result = long_tail_accuracy([0, 0, 2], [0, 0, 2], COUNTS)
    assert "accuracy_few" not in result
    assert result["per_class_accuracy"] == [1.0, None, 1.0, None, None, None]


def test_unbalanced_test_set_has_two_accuracies() -> None:
    result = long_tail_accuracy([0, 0, 0, 0], [0, 0, 0, 1], [10, 10])
    assert (result["accuracy"], result["class_mean_accuracy"]) == (0.75, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], COUNTS), "empty"),
        (([0, 1], [0], COUNTS), "2 predictions but 1 references"),
        (([0, 1], [0, 6], COUNTS), r"\[0, 6\).*row 1 has 6"),
        (([0, 1], [-100, 0], COUNTS), "row 0 has -100"),
        (([0.0, 1.0], [0, 1], COUNTS), "float64"),
        (([[0.1, 0.9]], [1], COUNTS), "argmax"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long_tail_accuracy(*arguments)


def test_overlapping_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        compute_metrics_for(COUNTS, few_below=50, many_above=20)


# ---- The module of `evaluate` ----


def random_evaluation(num_images: int = 37) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(num_images, len(COUNTS))), generator.integers(0, len(COUNTS), num_images)


def test_module_computes_in_batches(tmp_path: Path) -> None:
    from nc_hf.metrics import LongTailAccuracy

    logits, labels = random_evaluation()
    expected = long_tail_accuracy(logits.argmax(1), labels, COUNTS, few_below=60)
    metric = LongTailAccuracy(COUNTS, few_below=60, cache_dir=str(tmp_path))
    assert metric.compute(predictions=logits.argmax(1), references=labels) == expected
    for part in np.array_split(np.arange(len(labels)), 4):
        metric.add_batch(predictions=torch.tensor(logits.argmax(1)[part]), references=torch.tensor(labels[part]))
    assert metric.compute() == expected
    with pytest.raises(ValueError, match="scores that are not finite"):
        metric.compute(predictions=np.full_like(logits, np.nan), references=labels)


def test_modules_combine_on_logits(tmp_path: Path) -> None:
    import evaluate

    from nc_hf.metrics import CalibrationError, LongTailAccuracy

    logits, labels = random_evaluation()
    both = evaluate.combine([LongTailAccuracy(COUNTS, cache_dir=str(tmp_path)), CalibrationError(keep_in_memory=True)])
    result = both.compute(predictions=logits, references=labels)
    expected = long_tail_accuracy(logits.argmax(1), labels, COUNTS) | expected_calibration_error(logits, labels)
    assert result == expected


RANK = """
import json, os, sys
import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from nc_hf.metrics import LongTailAccuracy, compute_metrics_for

class Identity(torch.nn.Module):
    def forward(self, pixel_values, labels):
        return {"loss": pixel_values.sum(), "logits": pixel_values}

rank, folder = int(os.environ["RANK"]), sys.argv[1]
logits, labels, counts = (np.array(values) for values in json.load(sys.stdin))
options = dict(per_device_eval_batch_size=5, report_to="none", use_cpu=True, disable_tqdm=True)
args = TrainingArguments(folder, ddp_backend="gloo", **options)
metric = LongTailAccuracy(counts, num_process=2, process_id=rank, experiment_id="two", cache_dir=folder)
metric.add_batch(predictions=logits.argmax(1)[rank::2], references=labels[rank::2])
module = metric.compute()
compute_metrics = compute_metrics_for(counts, test_counts=np.bincount(labels, minlength=len(counts)))
rows = [{"pixel_values": torch.tensor(z), "labels": torch.tensor(y)} for z, y in zip(logits, labels)]
trained = Trainer(Identity(), args, eval_dataset=rows, compute_metrics=compute_metrics).evaluate()
print(json.dumps([args.world_size, module, trained]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_count_each_image_once(tmp_path: Path) -> None:
    logits, labels = random_evaluation()
    with socket.socket() as port:
        port.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port.getsockname()[1]), "WORLD_SIZE": "2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in ("0", "1")
    ]
    try:
        for rank in ranks:  # both must have their input before either can end
            rank.stdin.write(json.dumps([logits.tolist(), labels.tolist(), COUNTS]))
            rank.stdin.close()
            rank.stdin = None
        reports = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    expected = long_tail_accuracy(logits.argmax(1), labels, COUNTS)
    assert [report[1] for report in reports] == [expected, None]
    for world_size, _, trained in reports:
        assert world_size == 2
        assert trained["eval_accuracy_few"] == expected["accuracy_few"]
        assert trained["eval_ece"] == pytest.approx(expected_calibration_error(logits, labels)["ece"])


# ---- The Trainer's compute_metrics ----


def test_compute_metrics_is_flat_floats() -> None:
    from transformers import EvalPrediction

    logits, labels = random_evaluation()
    result = compute_metrics_for(COUNTS)(EvalPrediction(predictions=(logits, -logits), label_ids=labels))
    expected = long_tail_accuracy(logits.argmax(1), labels, COUNTS) | expected_calibration_error(logits, labels)
    del expected["per_class_accuracy"]
    assert result == pytest.approx(expected)
    assert all(type(value) is float for value in result.values())


def test_trainer_logs_the_metrics(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Identity(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": torch.nn.functional.cross_entropy(pixel_values, labels), "logits": pixel_values}

    logits, labels = random_evaluation()
    rows = [{"pixel_values": torch.tensor(z), "labels": torch.tensor(y)} for z, y in zip(logits, labels, strict=True)]
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=5, report_to="none", use_cpu=True)
    compute_metrics = compute_metrics_for(COUNTS, test_counts=np.bincount(labels, minlength=len(COUNTS)))
    metrics = Trainer(Identity(), args, eval_dataset=rows, compute_metrics=compute_metrics).evaluate()
    expected = long_tail_accuracy(logits.argmax(1), labels, COUNTS)
    assert metrics["eval_accuracy"] == expected["accuracy"]
    assert metrics["eval_accuracy_few"] == expected["accuracy_few"]
    assert metrics["eval_ece"] == pytest.approx(expected_calibration_error(logits, labels)["ece"])


def test_padding_counted_twice_is_an_error() -> None:
    from transformers import EvalPrediction

    compute_metrics = compute_metrics_for([30, 10], test_counts=[2, 1])
    counted_once = EvalPrediction(predictions=np.eye(2)[[0, 0, 1]], label_ids=np.array([0, 0, 1]))
    assert compute_metrics(counted_once)["accuracy"] == 1.0
    padded = EvalPrediction(predictions=np.eye(2)[[0, 0, 1, 0]], label_ids=np.array([0, 0, 1, 0]))
    with pytest.raises(ValueError, match="4 images were evaluated but the set has 3: class 0 was counted 3 times"):
        compute_metrics(padded)


def test_import_leaves_heavy_libraries_alone() -> None:
    heavy = "import sys, nc_hf.metrics; print({'evaluate', 'datasets', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.strip() == "set()"
