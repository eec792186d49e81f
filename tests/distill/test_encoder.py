"""Label-free distillation of sentence encoders: the loss, the vectors, a run that learns, resumes and raises."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

pytest.importorskip("accelerate")

from kron_kernels.distill import encoder
from kron_kernels.models import KronBertModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}


class Tokenizer:
    """Words are numbers."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [" ".join(map(str, torch.randint(1, 96, (n,), generator=generator).tolist())) for n in lengths]


@pytest.fixture
def teacher() -> Any:
    return BertModel(
        BertConfig(**SIZES, max_position_embeddings=16, hidden_dropout_prob=0.0), add_pooling_layer=False
    ).eval()


def test_loss_is_zero_for_the_teacher_and_counts_all_parts() -> None:
    teacher = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    rotated = teacher @ torch.linalg.qr(torch.randn(8, 8)).Q  # other vectors, the same similarities
    assert encoder.sentence_loss(teacher, teacher) == pytest.approx(0, abs=1e-6)
    cosine = 1 - (rotated * teacher).sum(-1).mean()
    torch.testing.assert_close(encoder.sentence_loss(rotated, teacher), cosine, rtol=1e-4, atol=1e-6)
    flipped = teacher.clone()
    flipped[0] = -flipped[0]
    similarities = (flipped @ flipped.T - teacher @ teacher.T).square().mean()
    divergence = 0.0
    for row in range(6):
        others = [column for column in range(6) if column != row]
        wanted, got = (((each[row] @ each[others].T) / 0.05).softmax(0) for each in (teacher, flipped))
        divergence += float((wanted * (wanted / got).log()).sum()) / 6
    expected = 2 / 6 + 20 * float(similarities) + 0.3 * divergence
    assert float(encoder.sentence_loss(flipped, teacher)) == pytest.approx(expected, rel=1e-4)


def test_vectors_do_not_depend_on_the_batch(teacher: Any) -> None:
    rows = Tokenizer()(sentences(20), True, 16)["input_ids"]
    together = encoder.encode(teacher, rows, batch_size=7)
    alone = torch.cat([encoder.encode(teacher, [row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(20))


def test_student_learns_and_an_interrupted_run_resumes_to_the_same_weights(teacher: Any, tmp_path: Path) -> None:
    texts = sentences(80)
    rows = Tokenizer()(texts, True, 16)["input_ids"]
    wanted = encoder.encode(teacher, rows)

    def distill(folder: str, steps: int = 60) -> Any:
        student = KronBertModel.from_dense(teacher, "K8")
        return encoder.distill_encoder(
            teacher, student, Tokenizer(), texts, tmp_path / folder, max_steps=steps, batch_size=16, learning_rate=5e-3
        )

    before = encoder.encode(KronBertModel.from_dense(teacher, "K8").eval(), rows)
    student, result = distill("whole")
    after = encoder.encode(student, rows)
    assert result.steps == 60
    assert encoder.sentence_loss(after, wanted) < 0.7 * encoder.sentence_loss(before, wanted)
    assert not student.training
    # The folder holds a checkpoint of step 60 and one before: without the last, the run repeats its last steps.
    last = max((tmp_path / "whole/checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    again, _ = distill("whole")
    for one, other in zip(student.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_on_its_own_text_and_models_only(teacher: Any, tmp_path: Path) -> None:
    student = KronBertModel.from_dense(teacher, "K8")
    options = {"max_steps": 2, "batch_size": 8}
    encoder.distill_encoder(teacher, copy.deepcopy(student), Tokenizer(), sentences(40), tmp_path, **options)
    with pytest.raises(ValueError, match=r"data: .* holds a run with another data"):
        encoder.distill_encoder(teacher, copy.deepcopy(student), Tokenizer(), sentences(39), tmp_path, **options)
    other = copy.deepcopy(teacher)
    other.embeddings.word_embeddings.weight.data[3, 3] += 1
    with pytest.raises(ValueError, match=r"teacher: .* holds a run with another teacher"):
        encoder.distill_encoder(other, copy.deepcopy(student), Tokenizer(), sentences(40), tmp_path, **options)
    # Finished: the student becomes the trained one, and no step is added.
    again = copy.deepcopy(student)
    assert encoder.distill_encoder(teacher, again, Tokenizer(), sentences(40), tmp_path, **options)[1].steps == 2
    assert not torch.equal(again.encoder.layer[0].output.dense.a, student.encoder.layer[0].output.dense.a)


def test_bad_input(teacher: Any, tmp_path: Path) -> None:
    student = KronBertModel.from_dense(teacher, "K8")
    with pytest.raises(ValueError, match="sentences: expected at least 256 different ones, got 3"):
        encoder.distill_encoder(teacher, student, Tokenizer(), ["1 2", "3", "", "4", "3 "], tmp_path)
    other = BertModel(BertConfig(**{**SIZES, "hidden_size": 64}))
    with pytest.raises(ValueError, match="student: expected the teacher's hidden size 64, got 32"):
        encoder.distill_encoder(other, student, Tokenizer(), sentences(40), tmp_path, batch_size=8)


def test_loss_that_is_not_finite_ends_the_run(teacher: Any, tmp_path: Path) -> None:
    student = KronBertModel.from_dense(teacher, "K8")
    with torch.no_grad():
        student.encoder.layer[0].attention.self.query.a.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss: expected a finite number, got nan"):
        encoder.distill_encoder(teacher, student, Tokenizer(), sentences(40), tmp_path, max_steps=3, batch_size=8)


def test_command(bert: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kron_kernels.cli import main

    assert main(["compress", str(bert), str(tmp_path / "small"), "--preset", "K8"]) == 0
    lines = [f"{line} {line}" if twice else line for line in text.read_text().splitlines() for twice in (0, 1)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    arguments = ["--teacher", str(bert), "--student", str(tmp_path / "small"), "--text", str(tmp_path / "lines.txt")]
    options = ["--max-steps", "3", "--batch-size", "4", "--json", "--out", str(tmp_path / "run")]
    capsys.readouterr()
    assert main(["distill", "encoder", *arguments, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 3
    assert result["before"]["cosine"] != result["after"]["cosine"]
    assert (tmp_path / "run/model/tokenizer_config.json").is_file() or (tmp_path / "run/model/vocab.txt").is_file()
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    assert main(["distill", "encoder", *arguments[:4], "--text", str(tmp_path / "few.txt"), *options]) == 2
    assert "text: expected at least 20 different sentences, got 2" in capsys.readouterr().err
