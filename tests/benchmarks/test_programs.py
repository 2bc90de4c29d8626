"""The benchmark programs, on checkpoints and tensors that take no time: what they read, count and say.

No test looks at a speed. The programs import one another as scripts do, from their own folder.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hanok
from hanok.bench.spread import Spread, rounded

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = (
    *("checkpoints", "measure", "generate", "attention", "linear"),
    *("gguf_files", "engine_contestants", "cpu_engines", "equal_bits"),
)
# Sums of at most 160 float32 products of numbers around 1; four layers of them stay far below.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def programs() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in PROGRAMS})
    for name in PROGRAMS:
        sys.modules.pop(name, None)


@pytest.fixture
def quick_guard(programs: SimpleNamespace) -> Any:
    return programs.measure.Guard(limit=1e9, patience_s=0.0, attempts=1)


def small(shape: Any) -> Any:
    """Return a shape's family, ties and constants with a tiny model's sizes."""
    return dataclasses.replace(
        shape,
        name=f"small-{shape.name}",
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=160,
        vocab_size=256,
    )


@pytest.mark.parametrize("name", ["llama-1.1b", "qwen-0.5b", "tiny"])
def test_both_engines_read_a_checkpoint_alike(
    programs: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    import transformers

    shape = small(programs.checkpoints.SHAPES[name])
    folder = programs.checkpoints.make_checkpoint(shape, tmp_path)
    ours = hanok.load(folder, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = list(range(3, 40))
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids])).logits[0]
    assert expected.std() > 0.05
    assert (ours.logits(token_ids) - expected).abs().max() < TOLERANCE
    assert ours.end_ids == {2}
    assert ours.config.tie_embeddings is shape.is_tied


def test_shapes_have_the_sizes_they_are_named_for(programs: SimpleNamespace) -> None:
    shapes = programs.checkpoints.SHAPES
    counts = {
        name: programs.generate.read_config(shapes[name].config(), name)[1].num_parameters()
        for name in ("llama-1.1b", "qwen-0.5b")
    }
    # TinyLlama-1.1B and Qwen2.5-0.5B, counted from their published sizes.
    assert counts == {"llama-1.1b": 1_100_048_384, "qwen-0.5b": 494_032_768}


def test_checkpoint_is_made_once_and_is_decided_by_the_seed(
    programs: SimpleNamespace, tmp_path: Path
) -> None:
    make, shape = programs.checkpoints.make_checkpoint, programs.checkpoints.SHAPES["tiny"]
    weights = make(shape, tmp_path) / "model.safetensors"
    first, written = weights.read_bytes(), weights.stat().st_mtime_ns
    make(shape, tmp_path)
    assert weights.stat().st_mtime_ns == written
    (weights.parent / "config.json").unlink()
    make(shape, tmp_path)
    assert weights.stat().st_mtime_ns != written
    assert weights.read_bytes() == first
    assert (make(shape, tmp_path, seed=1) / "model.safetensors").read_bytes() != first


def test_statistics(programs: SimpleNamespace) -> None:
    spread = Spread.of([3.0, 1.0, 20.0])
    assert (spread.median, spread.low, spread.high) == (3.0, 1.0, 20.0)
    assert str(spread) == "3.00 (1.00–20.0)"
    assert str(Spread.of([2.5])) == "2.50"
    assert [rounded(value) for value in (0.0123, 99.96, 123.4, 2048)] == [
        "0.0123",
        "100",
        "123",
        "2048",
    ]
    # Medians 4 and 2; within the rounds 6/2, 4/1 and 2/4.
    found = Spread.of_ratio([6.0, 4.0, 2.0], [2.0, 1.0, 4.0])
    assert (found.median, found.low, found.high) == (2.0, 0.5, 4.0)


def test_table(programs: SimpleNamespace) -> None:
    assert programs.measure.table(("name", "a"), [("x|y", 1), ("z", "long")]) == "\n".join(
        [
            r"| name |    a |",
            r"| ---- | ---: |",
            r"| x\|y |    1 |",
            r"| z    | long |",
        ]
    )
    with pytest.raises(ValueError, match="each column"):
        programs.measure.table(("name", "a"), [("x",)])


def test_guard_repeats_a_disturbed_run_and_keeps_the_least_disturbed(
    programs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = programs.measure
    shares = iter([0.9, 0.3, 0.5])
    monkeypatch.setattr(measure.ForeignLoad, "cores", lambda self: next(shares))
    results = iter(["first", "second", "third"])
    run = measure.Guard(limit=0.1, patience_s=0.0).run(lambda: next(results))
    assert (run.result, run.foreign, run.is_disturbed) == ("second", 0.3, True)
    shares, results = iter([0.9, 0.05]), iter(["first", "second"])
    run = measure.Guard(limit=0.1, patience_s=0.0).run(lambda: next(results))
    assert (run.result, run.is_disturbed) == ("second", False)


def test_interleaving_begins_each_round_with_another(
    programs: SimpleNamespace, quick_guard: Any
) -> None:
    seen: list[str] = []
    logged: list[dict[str, Any]] = []

    def action(name: str) -> dict[str, Any]:
        seen.append(name)
        return {"value": len(seen)}

    rows = programs.measure.interleave(
        {name: lambda name=name: action(name) for name in "abc"},
        runs=2,
        guard=quick_guard,
        log=logged.append,
    )
    assert "".join(seen) == "abcbca"
    assert [row["value"] for row in rows["a"]] == [1, 6]
    assert [row["name"] for row in logged] == seen
    assert programs.measure.count_disturbed(rows) == 0


def test_cold_process(programs: SimpleNamespace, tmp_path: Path) -> None:
    measure, generate = programs.measure, programs.generate
    shape = programs.checkpoints.SHAPES["tiny"]
    folder = programs.checkpoints.make_checkpoint(shape, tmp_path)
    more = ("--context", "16", "--new-tokens", "4", "--repeats", "1")
    command = generate.worker_command("hanok", folder, shape.vocab_size, *more)
    row = measure.run_cold(command, threads=1)
    assert row["threads"] == 1
    assert len(row["tokens"]) == 5
    assert 0 < row["ready_s"] <= row["first_token_s"]
    assert 0 < row["first_peak_gib"] <= row["peak_gib"]
    assert row["decode_per_s"] > 0
    with pytest.raises(RuntimeError, match="status 3"):
        measure.run_cold([sys.executable, "-c", "raise SystemExit(3)"], threads=1)


def generation_rows(tokens: list[int], scale: float) -> list[dict[str, Any]]:
    row = {
        "ready_s": 1.0,
        "first_token_s": 2.0,
        "prefill_per_s": 100.0,
        "decode_per_s": 10.0 * scale,
        "first_peak_gib": 1.0,
        "peak_gib": 2.0 / scale,
        "private_gib": 1.0,
        "tokens": tokens,
        "is_disturbed": False,
    }
    return [row, row]


def test_generation_report(programs: SimpleNamespace) -> None:
    generate = programs.generate
    rows = {
        "hanok": generation_rows([5, 6, 7, 8], 3.0),
        "transformers": generation_rows([5, 6, 9, 8], 1.0),
        "memory": [{"gb_per_s": 20.0, "is_disturbed": True}],
    }
    asked = {"decode": 2.5, "peak": 4.0}
    text = generate.section(programs.checkpoints.SHAPES["qwen-0.5b"], rows, asked)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert cells["decode, tokens/s"] == ["30.0", "10.0", "3.00", "≥ 2.5", "yes"]
    assert cells["peak memory, GiB"] == ["0.667", "2.00", "3.00", "≥ 4", "no"]
    assert cells["prefill, tokens/s"] == ["100", "100", "1.00", "–", "–"]
    assert "the first 2 are the same, 3 in all" in text
    # 0.494 G parameters of 2 bytes; 30 tokens/s of them are more than the probe's 20 GB/s.
    assert "A token reads 0.988 GB" in text
    assert "hanok 29.6 GB/s, 148%; transformers 9.88 GB/s, 49%" in text
    assert "0 of 4 runs were disturbed" in text


def test_float32_agreement(programs: SimpleNamespace) -> None:
    agreement = programs.generate.float32_agreement
    assert agreement({"hanok": [1, 2], "transformers": [1, 2]})[1]
    sentence, is_same = agreement({"hanok": [1, 2], "transformers": [1, 3]})
    assert not is_same
    assert "token 1 DIFFERS" in sentence


def test_attention_contestants_agree(programs: SimpleNamespace, quick_guard: Any) -> None:
    attention = programs.attention
    case = attention.AttentionCase(
        num_heads=8, num_kv_heads=2, head_dim=16, keys=33, dtype="float32"
    )
    rounds = attention.Rounds(quick_guard)
    report = attention.measured(
        case, ring_bytes=3 * case.cache_bytes, runs=2, rounds=rounds, min_sample_s=0.0
    )
    (result,) = report.results
    assert next(iter(result.measured)) == "usual call"
    assert {"native", "sdpa", "eager"} <= set(result.measured)
    assert all(len(row.samples) == 2 for row in result.measured.values())
    assert max(row.max_error for row in result.measured.values()) < TOLERANCE
    assert rounds.disturbed == 0
    assert len(attention.table_row(result)) == 12


def test_attention_marks_what_is_asked(programs: SimpleNamespace) -> None:
    attention = programs.attention
    case = attention.AttentionCase(keys=16384)

    def asked(**seconds: float) -> str:
        rows = {
            name: SimpleNamespace(samples=(value,), gb_per_s=1.0, max_error=0.0)
            for name, value in {"usual call": 1e-3, "eager": 5e-4, **seconds}.items()
        }
        return str(attention.table_row(SimpleNamespace(case=case, measured=rows))[9])

    assert asked(native=6e-5, sdpa=1e-4) == "≥ 10: yes, ≥ 2: no"
    assert asked(native=6e-5, sdpa=2e-4) == "≥ 10: no, ≥ 2: yes"


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_linear_products_are_forced_and_agree(
    programs: SimpleNamespace, quick_guard: Any, num_tokens: int
) -> None:
    linear = programs.linear
    weights = linear.copies_of((64, 96), 3 * 64 * 96 * 2)
    assert len(weights) == 3
    x = torch.randn(num_tokens, 64, dtype=torch.bfloat16)
    expected = x.float() @ weights[0].float().t()
    products = linear.products(num_tokens)
    assert ("vector" in products) is (num_tokens == 1)
    for product in products:
        with linear.forced(product):
            assert linear.linear.choose_product(weights[0], num_tokens) == product
            found = linear.linear.dense(x, weights[0]).float()
        assert (found - expected).abs().max() < 0.02
    assert linear.linear.choose_product.__name__ == "choose_product"
    seconds, disturbed = linear.measure_tokens(x, weights, runs=2, turn_s=1e-4, guard=quick_guard)
    assert tuple(seconds) == products
    assert all(len(values) == 2 for values in seconds.values())
    assert disturbed == 0


def test_linear_table(programs: SimpleNamespace) -> None:
    weight = torch.empty(1000, 1000, dtype=torch.bfloat16)
    seconds = {"torch": [1e-3], "torch without oneDNN": [2e-3], "widened": [1e-3, 3e-3, 4e-3]}
    assert programs.linear.table_row(2, weight, seconds, "widened") == [
        "2",
        "2.00, 4.00 GF ★",
        "–",
        "1.00, 2.00 GF",
        "–",
        "**0.667 (0.500–2.00), 1.33 GF**",
        "3.00",
    ]


def test_report_names_machine_and_versions(programs: SimpleNamespace, tmp_path: Path) -> None:
    measure = programs.measure
    assert "avx512_bf16 " in measure.machine_line()
    assert f"hanok {hanok.__version__}" in measure.versions_line()
    assert "- Threads: 3" in measure.heading("Title", 3)
    log = measure.json_lines(tmp_path / "log.jsonl")
    log({"a": 1})
    log({"a": 2})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["a"] for line in lines] == [1, 2]


@pytest.mark.parametrize("name", ["llama-1.1b", "qwen-0.5b"])
def test_a_gguf_file_holds_the_checkpoint(
    programs: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    gguf, shape = programs.gguf_files, small(programs.checkpoints.SHAPES[name])
    folder = programs.checkpoints.make_checkpoint(shape, tmp_path)
    file = gguf.write_gguf(folder, tmp_path / "model.gguf")
    keys, tensors = gguf.read_gguf(file)
    assert keys["general.architecture"] == shape.model_type
    assert keys[f"{shape.model_type}.block_count"] == shape.num_layers
    checkpoint = hanok.load(folder, dtype="float32", weights="copied").checkpoint
    found = dict(gguf.hugging_face_floats(file, checkpoint.config))
    assert set(found) == {n for n in checkpoint.tensors if not (shape.is_tied and "lm_head" in n)}
    for tensor_name, values in found.items():
        ref = checkpoint.tensors[tensor_name]
        exact = torch.empty(tuple(ref.shape), dtype=torch.bfloat16)
        gguf.read_into(ref, exact)
        assert torch.equal(values, exact.float())
    table = shape.vocab_size * shape.hidden_size * 2
    total = sum(tensor.size_bytes for tensor in tensors)
    assert gguf.bytes_per_token(file) == total - (0 if shape.is_tied else table)
    matrices = sum(values.numel() for values in found.values() if values.dim() > 1)
    assert gguf.weights_by_kind(file) == {"BF16": matrices}


def test_kinds_of_a_file_are_said(programs: SimpleNamespace) -> None:
    sentence = programs.gguf_files.kinds_sentence("Q4_K_M", {"Q5_0": 3, "Q8_0": 1})
    assert sentence == "Weights of the matrices of llama.cpp's Q4_K_M: 75.0% Q5_0, 25.0% Q8_0."
    assert set(programs.gguf_files.KIND_NAMES) == set(programs.gguf_files.BLOCKS)


def test_turned_rows_are_turned_back(programs: SimpleNamespace) -> None:
    rows = torch.arange(24.0).view(12, 2)
    turned = programs.gguf_files.turned_rows(rows, 2)
    assert turned[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert torch.equal(programs.gguf_files.unturned_rows(turned, 2), rows)


# Blocks worked out by hand from the layouts: scale 0.5, and codes that say where they stand.
HALF = [0x00, 0x38]


@pytest.mark.parametrize(
    ("kind", "block", "values"),
    [
        (8, [*HALF, *range(31), 0x80], [*(i / 2 for i in range(31)), -64.0]),
        (2, [*HALF, 0x90, *[0x88] * 15], [-4.0, *[0.0] * 15, 0.5, *[0.0] * 15]),
        (6, [*HALF, 1, 0, 0, 0, 0x10, *[0] * 15], [0.0, *[-8.0] * 15, -7.5, *[-8.0] * 15]),
    ],
)
def test_blocks_become_floats(
    programs: SimpleNamespace, kind: int, block: list[int], values: list[float]
) -> None:
    count, size, decode = programs.gguf_files.BLOCKS[kind]
    assert (count, size) == (len(values), len(block))
    assert decode(torch.tensor([block], dtype=torch.uint8)).flatten().tolist() == values


def test_superblocks_become_floats(programs: SimpleNamespace) -> None:
    """Against the format written out in loops."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 210), generator=generator, dtype=torch.uint8)
    blocks[:, 208:] = torch.tensor(HALF, dtype=torch.uint8)
    found = programs.gguf_files.q6_k(blocks)
    for b in range(3):
        block = blocks[b].tolist()
        for i in range(256):
            part, rest = divmod(i, 128)
            low = block[64 * part + rest % 64] >> (4 * (rest // 64)) & 15
            high = block[128 + 32 * part + rest % 32] >> (2 * (rest // 32)) & 3
            scale = block[192 + i // 16]
            scale -= 256 * (scale > 127)
            assert found[b, i] == 0.5 * scale * ((low | high << 4) - 32)
    blocks = torch.randint(0, 256, (3, 144), generator=generator, dtype=torch.uint8)
    blocks[:, :4] = torch.tensor(HALF * 2, dtype=torch.uint8)
    found = programs.gguf_files.q4_k(blocks)
    for b in range(3):
        block = blocks[b].tolist()
        packed = block[4:16]
        for i in range(256):
            j = i // 32
            if j < 4:
                scale, minimum = packed[j] & 63, packed[j + 4] & 63
            else:
                scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
                minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
            code = block[16 + 32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2)) & 15
            assert found[b, i] == 0.5 * scale * code - 0.5 * minimum


def test_engines_are_compared_round_by_round(programs: SimpleNamespace) -> None:
    engines = programs.cpu_engines
    ours = {"decode_per_s": 30.0, "prefill_per_s": 300.0, "together_per_s": 120.0}
    ours |= {"bytes_per_token": 10**9, "four_tokens": 1.1, "load_s": 1.0}
    ours |= {"load_gib": 1.75, "weights_gib": 1.0, "largest_tensor_gib": 0.25}
    theirs = {"decode_per_s": 20.0, "prefill_per_s": 200.0, "together_per_s": 40.0}
    rows = {"hanok int8": [ours], "llama.cpp Q8_0": [theirs], "memory": [{"gb_per_s": 40.0}]}
    contestant = programs.engine_contestants.Contestant
    contestants = [
        contestant(engine="hanok", precision="int8", run=dict),
        contestant(engine="llama.cpp", precision="Q8_0", run=dict, bytes_per_token=2 * 10**9),
    ]
    table = engines.engines_table(contestants, rows)
    assert "75%" in table
    assert "100%" in table
    lines = engines.demands_table(contestants, rows).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]] for line in lines}
    assert cells["decode int8 / llama.cpp Q8_0"][:3] == ["1.50", "≥ 1.2", "yes"]
    assert cells["prefill int8 / llama.cpp Q8_0"][:3] == ["1.50", "≥ 2.5", "no"]
    assert cells["8 sequences int8 / one"][:3] == ["4.00", "≥ 3.5", "yes"]
    assert cells["int8: share of the memory's speed"][:3] == ["0.750", "≥ 0.8", "no"]
    assert cells["int8: a pass of 4 tokens / of 1"][:3] == ["1.10", "≤ 1.2", "yes"]
    # 1 GiB of weights, 0.25 of the largest tensor, 0.6 GB.
    assert cells["int8: peak memory of loading, GiB"][:3] == ["1.75", "≤ 1.81", "yes"]
    assert cells["decode bf16 / transformers"][:2] == ["not measured", "≥ 2.5"]
    too_much = engines.own_demands("int8", [ours | {"load_gib": 1.85}], rows["memory"])
    assert too_much[-1][-1] == "no"


def test_engines_that_fail_are_left_out_with_the_reason(programs: SimpleNamespace) -> None:
    engines = programs.engine_contestants

    def fails(error: Exception) -> Any:
        def run(lengths: Any) -> None:
            assert lengths == engines.TRIAL
            raise error

        return run

    runs = {
        "good": lambda lengths: {},
        "old": fails(RuntimeError("a command ended with status 1:\n\nImportError: no module x.\n")),
        "gone": fails(FileNotFoundError(2, "No such file or directory", "llama-bench")),
    }
    items = [engines.Contestant(engine="x", precision=name, run=run) for name, run in runs.items()]
    able, unable = engines.tried(items)
    assert [item.precision for item in able] == ["good"]
    assert unable == [
        "x old is left out: ImportError: no module x.",
        "x gone is left out: [Errno 2] No such file or directory: 'llama-bench'.",
    ]
    ours = engines.Contestant(engine="hanok", precision="int8", run=fails(RuntimeError("broken")))
    assert engines.tried([ours]) == ([ours], [])


def test_a_lost_line_is_asked_for_again(programs: SimpleNamespace, tmp_path: Path) -> None:
    once = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); e = p.exists(); p.touch()"
    command = [sys.executable, "-c", f"{once}; print('log'); e and print('{{\"a\": 1}}')"]
    first_json_line = programs.engine_contestants.first_json_line
    assert first_json_line([*command, tmp_path / "seen"]) == {"a": 1}
    with pytest.raises(RuntimeError, match="printed no result in 1 runs"):
        first_json_line([*command, tmp_path / "never"], attempts=1)


def test_engines_that_are_not_there_are_left_out_with_what_to_do(
    programs: SimpleNamespace, tmp_path: Path
) -> None:
    engines = programs.engine_contestants
    options = SimpleNamespace(
        folder=tmp_path, only=["llama.cpp", "OpenVINO"], llama_cpp=None, openvino=None, threads=1
    )
    found, missing = engines.contestants(programs.checkpoints.SHAPES["tiny"], options)
    assert found == []
    assert [line.split(":")[0] for line in missing] == [
        "llama.cpp is left out",
        "OpenVINO is left out",
    ]
    assert "--llama-cpp" in missing[0]
    assert "--openvino" in missing[1]
    assert not list(tmp_path.glob("*.gguf"))
    # A folder without the programs: the file of the checkpoint is made, the rest is refused.
    options.llama_cpp, options.only = tmp_path / "nothing", ["llama.cpp"]
    found, missing = engines.contestants(programs.checkpoints.SHAPES["tiny"], options)
    assert found == []
    assert "llama-quantize" in missing[0]
    assert (tmp_path / "tiny-seed0.gguf").is_file()


def test_gguf_files_of_shapes_with_dots_keep_their_names(
    programs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, gguf = programs.engine_contestants, programs.gguf_files
    shape = small(programs.checkpoints.SHAPES["llama-1.1b"])
    monkeypatch.setattr(gguf, "quantized", lambda source, kind, *_: source)
    options = SimpleNamespace(llama_cpp=tmp_path, threads=1)
    folder = programs.checkpoints.make_checkpoint(shape, tmp_path)
    found = engines.llama_cpp_contestants(shape, folder, options)
    assert [item.precision for item in found] == ["bf16", "Q8_0", "Q4_0", "Q4_K_M"]
    assert [file.name for file in tmp_path.glob("*.gguf")] == ["small-llama-1.1b-seed0.gguf"]


@pytest.mark.parametrize(("head", "expected"), [("lm_head", 7), ("embed_tokens", 107)])
def test_bytes_of_an_exported_model(
    programs: SimpleNamespace, tmp_path: Path, head: str, expected: int
) -> None:
    """An embedding counts when it is the head too."""
    constants = [("self.model.embed_tokens.w", 100), ("self.model.layers.0.w", 5), (f"{head}.w", 2)]
    if head == "embed_tokens":
        constants[2] = ("self.model.norm.w", 2)
    layers = [
        f'<layer name="{name}" type="Const"><data size="{size}" element_type="u8" /></layer>'
        for name, size in constants
    ]
    text = f'<net><layers>{"".join(layers)}<layer name="input" type="Parameter"/></layers></net>'
    (tmp_path / "openvino_model.xml").write_text(text)
    assert programs.engine_contestants.openvino_bytes_per_token(tmp_path) == expected


def test_keys_and_values_are_told_apart(programs: SimpleNamespace) -> None:
    options = SimpleNamespace(context=512, new_tokens=128)
    shape = programs.checkpoints.SHAPES["llama-1.1b"]
    # 22 layers x keys and values x 4 heads x 64 x 2 bytes x 576 tokens.
    assert "reads 13.0 MB of keys" in programs.cpu_engines.cache_sentence(shape, options)


def test_engines_run_on_a_tiny_shape(programs: SimpleNamespace, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, str(BENCHMARKS / "cpu_engines.py"), "--quick", "--only", "hanok"]
    command += ["--folder", str(tmp_path), "--output", str(report), "--threads", "1"]
    programs.measure.subprocess.run(command, check=True, capture_output=True)
    text = report.read_text()
    assert "## tiny" in text
    assert "| hanok int4" in text
    lines = [json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines if "name" in line) == [
        *(f"hanok {precision}" for precision in ("bf16", "int4", "int8", "nf4")),
        "memory",
    ]
    measured = [line for line in lines if line.get("name", "").startswith("hanok")]
    assert all(0 < line["largest_tensor_gib"] < line["weights_gib"] for line in measured)


def test_a_gguf_file_is_read_alike_by_its_own_library(
    programs: SimpleNamespace, tmp_path: Path
) -> None:
    library = pytest.importorskip("gguf", reason="the package gguf is not installed")
    shape = small(programs.checkpoints.SHAPES["llama-1.1b"])
    folder = programs.checkpoints.make_checkpoint(shape, tmp_path)
    file = programs.gguf_files.write_gguf(folder, tmp_path / "model.gguf")
    theirs = library.GGUFReader(file)
    keys, tensors = programs.gguf_files.read_gguf(file)
    assert {key: theirs.fields[key].contents() for key in keys} == keys
    assert [(item.name, list(reversed(item.shape))) for item in theirs.tensors] == [
        (item.name, list(item.shape)) for item in tensors
    ]
    ours = {tensor.name: values for tensor, values in programs.gguf_files.floats(file)}
    for item in theirs.tensors:
        exact = library.quants.dequantize(item.data, item.tensor_type)
        assert torch.equal(torch.from_numpy(exact.copy()), ours[item.name])


@pytest.mark.parametrize("kind", [2, 6, 8, 12, 14])
def test_blocks_become_the_floats_of_their_own_library(
    programs: SimpleNamespace, kind: int
) -> None:
    library = pytest.importorskip("gguf", reason="the package gguf is not installed")
    _, size, decode = programs.gguf_files.BLOCKS[kind]
    blocks = torch.randint(
        0, 256, (64, size), generator=torch.Generator().manual_seed(kind), dtype=torch.uint8
    )
    # Scales that are finite: float16 of at most 2.
    places = {12: (1, 3), 14: (209,)}.get(kind, (1,))
    for place in places:
        blocks[:, place] &= 0x3F
    exact = library.quants.dequantize(blocks.numpy(), library.GGMLQuantizationType(kind))
    assert torch.equal(torch.from_numpy(exact.copy()), decode(blocks))
