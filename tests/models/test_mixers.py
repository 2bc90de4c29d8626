"""A mixer and a block of a test's own: two files (tests/models/plugins), and nothing else is changed.

The mixer keeps a state of fixed size. Its oracle is the closed form of its recurrence.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tests.models.golden import weight

import hanok
from hanok.attention.base import ForwardBatch
from hanok.attention.cache import KVCache, why_not_paged
from hanok.attention.state import FixedState, KeysAndValues
from hanok.cli.main import cli
from hanok.engine.engine import Engine
from hanok.engine.generate import PrefixCache
from hanok.engine.model import Model
from hanok.engine.native_steps import why_not
from hanok.engine.speculate import Speculation
from hanok.errors import OptionError, UnsupportedError
from hanok.memory.planning import plan_load
from hanok.models import families, mixers
from hanok.models.config import ModelConfig
from hanok.models.decoder import Block
from hanok.models.family import families as known_families
from hanok.models.family import read_config, sources
from hanok.models.mixers.base import modules

PLUGINS = Path(__file__).parent / "plugins"
CONFIG: dict[str, Any] = {
    "model_type": "decayed",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "decay_size": 24,
    "decay_layers": [0, 2],
}
PROMPTS = [[5, 9, 700, 3, 3, 41], [77], [8, 1000, 12]]


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for package, folder in ((families, "families"), (mixers, "mixers")):
            patch.setattr(package, "__path__", [*package.__path__, str(PLUGINS / folder)])
        known_families.cache_clear()
        modules.cache_clear()
        yield
    known_families.cache_clear()
    modules.cache_clear()
    for name in ("hanok.models.families.decayed", "hanok.models.mixers.decay"):
        sys.modules.pop(name, None)


def saved(folder: Path, **changes: Any) -> Path:
    config = CONFIG | changes
    family, found = read_config(config, "config.json")
    tensors = {
        name: torch.tensor(weight(name, shape)).view(shape)
        for source in sources(family, found, []).values()
        for name, shape in zip(source.names, source.file_shapes(), strict=True)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(hanok.BUNDLED / name, folder / name)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return hanok.load(saved(tmp_path), dtype="float32")


def greedy(model: Model, prompt: Any, **options: Any) -> Any:
    return model.generate(prompt, max_new_tokens=9, temperature=0.0, ignore_eos=True, **options)


@torch.inference_mode()
def test_the_mixer_is_its_closed_form(model: Model) -> None:
    module = model.decoder.layers[0].self_attn
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    v, g = module.vg_proj(x).chunk(2, dim=-1)
    kept = module.decay.sigmoid()
    age = torch.arange(5)[:, None] - torch.arange(5)
    weights = torch.where(
        (age >= 0)[..., None], (1 - kept) * kept ** age.clamp(min=0)[..., None], 0
    )
    expected = module.o_proj((weights * v).sum(1) * g.sigmoid())
    batch = ForwardBatch.of([[1] * 5])
    torch.testing.assert_close(module(x, batch, None, None), expected, atol=1e-5, rtol=0)


def test_the_cache_changes_no_token_and_neighbours_none(model: Model) -> None:
    together = greedy(model, PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = greedy(model, prompt)
        assert (
            alone.token_ids == found.token_ids == greedy(model, prompt, use_cache=False).token_ids
        )
        assert len(alone.token_ids) == 9
    other = greedy(model, [*PROMPTS[0][:-1], 42])
    assert other.token_ids != together[0].token_ids  # the prompt counts


@torch.inference_mode()
def test_chunks_of_a_prompt_are_the_whole(model: Model) -> None:
    decoder, tokens = model.decoder, PROMPTS[0]
    whole = decoder(ForwardBatch.of([tokens]))
    cache = decoder.new_cache(3, 16)
    parts = [
        decoder(ForwardBatch.of([tokens[start:end]], past=[start], slots=[1]), cache)
        for start, end in ((0, 2), (2, 3), (3, 6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=0)


def test_a_kept_prefix_is_used_where_it_is_whole_and_computed_again_otherwise(
    model: Model,
) -> None:
    cache = PrefixCache()
    first = greedy(model, PROMPTS[0]).token_ids
    for prompt in (PROMPTS[0], [*PROMPTS[0], *first, 7], PROMPTS[0], PROMPTS[2]):
        events = model.stream(
            prompt, cache=cache, max_new_tokens=9, temperature=0.0, ignore_eos=True
        )
        assert [event.token_id for event in events] == greedy(model, prompt).token_ids


def test_a_plan_counts_the_bytes_that_its_state_takes(model: Model, tmp_path: Path) -> None:
    config, decoder = model.config, model.decoder
    per_token, fixed = 2 * 2 * 2 * 8 * 4, 2 * 24 * 4  # two layers of each kind, float32
    for num_tokens in (1, 50):
        assert config.kv_cache_bytes(num_tokens, "float32") == num_tokens * per_token + fixed
    plan = plan_load(tmp_path, dtype="float32", context=50, batch=3, may_measure=False)
    planned = [unit.cache_bytes for unit in plan.needs.units if unit.name.startswith("layers.")]
    assert planned == [3 * 24 * 4, 3 * 50 * 2 * 2 * 8 * 4] * 2
    assert sum(planned) == decoder.new_cache(3, 50).size_bytes
    shapes = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    assert config.parameter_shapes() == shapes
    # It costs the same after any number of tokens; attention costs more with each.
    grown = config.flops_per_token(100) - config.flops_per_token(99)
    assert grown == 2 * 4 * 4 * 8


def test_info_tells_bytes_of_a_token_from_those_of_a_sequence(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["info", str(saved(tmp_path)), "--json"])
    found = json.loads(result.stdout)["checkpoint"]
    assert found["kv cache"] == "128 bytes per token in bfloat16, and 192 per sequence"


def test_what_cannot_go_back_is_not_speculated_on(model: Model) -> None:
    with pytest.raises(OptionError) as caught:
        greedy(model, PROMPTS[0], speculation=Speculation())
    assert "layers of decayed keep a state of fixed size" in str(caught.value)
    bundled = hanok.load(hanok.BUNDLED)
    with pytest.raises(OptionError, match="cannot be truncated"):
        greedy(bundled, "Once", speculation=Speculation(method="draft", draft=model))
    assert bundled.config.why_not_truncated() is None


def test_an_engine_refuses_what_does_not_lie_in_blocks(model: Model) -> None:
    with pytest.raises(
        UnsupportedError, match="a state of fixed size, which is not kept in blocks"
    ):
        Engine(model, cache_tokens=256)


def test_a_state_of_fixed_size_goes_back_to_nothing_only() -> None:
    specs = [KeysAndValues(num_kv_heads=1, head_dim=2), FixedState(shape=(3,)), None]
    devices = [torch.device("cpu")] * 3
    cache = KVCache(specs, num_sequences=2, capacity=8, dtype=torch.float32, devices=devices)
    assert cache.size_bytes == 2 * sum(spec.nbytes(8, "float32") for spec in specs if spec)
    cache.advance([0, 1], [5, 4], [5, 4])
    fixed = cache.states[1].values
    fixed.fill_(1.0)
    cache.truncate(0, 5)
    assert cache.lengths == [5, 4]
    with pytest.raises(UnsupportedError, match="holds 5 tokens and cannot go back to 4"):
        cache.truncate(0, 4)
    assert cache.lengths == [5, 4]
    cache.keep(0, 4)
    assert cache.lengths == [0, 4]
    assert fixed.tolist() == [[0.0] * 3, [1.0] * 3]


def test_blocks_are_for_states_that_sequences_share() -> None:
    class Private(KeysAndValues):
        can_share = False

    shared, private = (kind(num_kv_heads=1, head_dim=2) for kind in (KeysAndValues, Private))
    assert why_not_paged([shared, None]) is None
    for specs, reason in (
        ([private, shared], "keys and values, which sequences cannot share"),
        ([shared, FixedState(shape=(3,))], "fixed size, which is not kept in blocks"),
    ):
        assert reason in str(why_not_paged(specs))


def test_passes_are_not_recorded(model: Model) -> None:
    reason = why_not(model.decoder, model.decoder.new_cache(1, 8))
    assert reason == "layers of DecayModule are not recorded"


def test_a_family_may_bring_a_block_of_its_own(tmp_path: Path) -> None:
    model = hanok.load(saved(tmp_path, scales_mixers=True), dtype="float32")
    assert not [block for block in model.decoder.layers if isinstance(block, Block)]
    found = greedy(model, PROMPTS)
    assert [item.token_ids for item in found] == [greedy(model, p).token_ids for p in PROMPTS]
    with torch.inference_mode():
        before = model.decoder(ForwardBatch.of(PROMPTS))
        for block in model.decoder.layers:
            block.mixer_scale.zero_()
        assert not torch.allclose(before, model.decoder(ForwardBatch.of(PROMPTS)), atol=1e-2)


def test_a_mixer_without_a_module_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(mixers, "__path__", mixers.__path__[:-1])
        modules.cache_clear()
        with pytest.raises(UnsupportedError, match=r"module of Decay\. Known: SoftmaxAttention"):
            hanok.load(folder)


def test_models_of_attention_can_go_back(tmp_path: Path) -> None:
    config: ModelConfig = read_config(CONFIG | {"decay_layers": []}, "config.json")[1]
    assert config.why_not_truncated() is None
