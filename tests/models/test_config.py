"""Reading `config.json`, and the formulas for parameters, bytes and FLOPs.

The totals in bytes are the `total_size` of the published index files.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hanok.errors import CheckpointError, HanokError, UnsupportedError
from hanok.models.config import (
    DynamicScaling,
    Experts,
    LayerConfig,
    Mlp,
    ModelConfig,
    Norm,
    Rope,
    SoftmaxAttention,
)
from hanok.models.decoder import Decoder
from hanok.models.family import families, read_config

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(config: dict[str, Any]) -> ModelConfig:
    return read_config(config, "a/config.json")[1]


def message_of(config: dict[str, Any], error: type[HanokError]) -> str:
    with pytest.raises(error) as caught:
        read(config)
    return str(caught.value)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "num_bytes", "active_billions"),
    [
        (LLAMA_3_1_8B, 16_060_522_496, 7.5),
        (MIXTRAL_8X7B, 93_405_585_408, 12.7),
        (QWEN3_30B_A3B, 61_064_245_248, 3.0),
    ],
    ids=["Llama-3.1-8B", "Mixtral-8x7B", "Qwen3-30B-A3B"],
)
def test_parameter_bytes_are_the_published_totals(
    config: dict[str, Any], num_bytes: int, active_billions: float
) -> None:
    found = read(config)
    assert found.parameter_bytes("bfloat16") == num_bytes
    assert found.parameter_bytes("float32") == 2 * num_bytes
    assert found.dtype == "bfloat16"
    assert round(found.num_active_parameters() / 1e9, 1) == active_billions


ATTENTION = SoftmaxAttention(
    num_heads=4, num_kv_heads=2, head_dim=6, rope=Rope(theta=1e4, rotary_dim=6)
)
SMALL = ModelConfig(
    model_type="llama",
    vocab_size=10,
    hidden_size=8,
    max_positions=32,
    norm=Norm(kind="rms", eps=1e-6),
    layers=(
        LayerConfig(mixer=ATTENTION, mlp=Mlp(intermediate_size=5, activation="silu")),
        LayerConfig(
            mixer=replace(ATTENTION, rope=None, window=3),
            mlp=Experts(
                num_experts=4,
                num_experts_per_token=2,
                intermediate_size=7,
                activation="silu",
                is_renormalised=True,
            ),
        ),
    ),
)
DENSE = replace(SMALL, layers=SMALL.layers[:1] * 2)
SHAPES = {
    "pre": SMALL,
    "tied": replace(SMALL, tie_embeddings=True),
    "biases": DENSE.with_attention(has_qkv_bias=True, has_output_bias=True).with_mlp(has_bias=True),
    "not gated": DENSE.with_mlp(is_gated=False),
    "layer norm": replace(SMALL, norm=Norm(kind="layer", eps=1e-5, has_bias=True)),
    "norms on heads": SMALL.with_attention(qk_norm="head"),
    "norms on all heads": SMALL.with_attention(qk_norm="full"),
    "post": SMALL.with_layers(norm_placement="post"),
    "sandwich": SMALL.with_layers(norm_placement="sandwich"),
    "parallel": SMALL.with_layers(norm_placement="parallel"),
    "shared": replace(
        SMALL.with_layers(norm_placement="shared"), norm=Norm(kind="layer", eps=1e-5)
    ),
    "learned positions": replace(SMALL, has_learned_positions=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_shapes_are_the_decoders(name: str) -> None:
    config = SHAPES[name]
    with torch.device("meta"):
        decoder = Decoder(config)
    built = {key: tuple(value.shape) for key, value in decoder.named_parameters()}
    assert config.parameter_shapes() == built
    assert config.num_parameters() == sum(value.numel() for value in decoder.parameters())


def test_flops_and_cache_of_a_small_decoder_by_hand() -> None:
    qkv, out = (24 + 2 * 12) * 8, 8 * 24
    dense_mlp = 2 * 5 * 8 + 8 * 5
    router, expert = 4 * 8, 2 * 7 * 8 + 8 * 7
    active = 10 * 8 + 2 * (qkv + out) + dense_mlp + router + 2 * expert
    assert SMALL.num_active_parameters() == active
    # The first layer sees all tokens, the second at most three.
    for context, seen in ((1, 1 + 1), (3, 3 + 3), (20, 20 + 3)):
        assert SMALL.flops_per_token(context) == 2 * active + 4 * 4 * 6 * seen
    # Keys and values, two layers, two heads of six.
    assert SMALL.kv_cache_bytes(5, "float16") == 2 * 2 * 2 * 6 * 5 * 2


def test_sequences_share_angles_up_to_where_dynamic_scaling_begins() -> None:
    assert SMALL.max_context_tokens == 32
    scaling = DynamicScaling(factor=2.5, max_positions=32)
    grown = SMALL.with_attention(rope=Rope(theta=1e4, rotary_dim=6, scaling=scaling))
    assert grown.max_context_tokens == 80
    assert grown.shares_angles(1, 32)
    assert not grown.shares_angles(32, 33)
    assert SMALL.shares_angles(1, 1000)


def yarn(factor: float, original: int | None) -> dict[str, Any]:
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}


QWEN_2_5_7B: dict[str, Any] = without(LLAMA_3_1_8B, "attention_bias", "rope_scaling") | {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
GEMMA_3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize(
    ("config", "scaling", "tokens"),
    [
        # Qwen2.5's recipe leaves the declared length as trained; Qwen3's own files have raised it.
        (QWEN_2_5_7B, yarn(4.0, 32768), 131072),
        (QWEN_2_5_7B | {"max_position_embeddings": 131072}, yarn(4.0, 32768), 131072),
        (QWEN_2_5_7B | {"max_position_embeddings": 40960}, yarn(4.0, 32768), 131072),
        (QWEN_2_5_7B, yarn(4.0, None), 131072),
        (QWEN_2_5_7B, yarn(2.0, 8192), 32768),
        # vicuna-7b-v1.5-16k
        (
            LLAMA_3_1_8B | {"max_position_embeddings": 4096},
            {"type": "linear", "factor": 4.0},
            16384,
        ),
        (
            LLAMA_3_1_8B | {"max_position_embeddings": 16384},
            {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096},
            16384,
        ),
        (
            LLAMA_3_1_8B | {"max_position_embeddings": 4096},
            {"type": "dynamic", "factor": 2.5},
            10240,
        ),
        # Llama 3.1 and Phi-3 declare what they reach.
        (LLAMA_3_1_8B, LLAMA_3_1_8B["rope_scaling"], 131072),
        (
            LLAMA_3_1_8B | {"original_max_position_embeddings": 4096},
            LONGROPE,
            131072,
        ),
        # Gemma 3 scales one layer of six, and declares what it reaches.
        (GEMMA_3, {"rope_type": "linear", "factor": 8.0}, 131072),
    ],
)
def test_a_scaled_rope_reaches_as_far_as_vllm_says(
    config: dict[str, Any], scaling: dict[str, Any], tokens: int
) -> None:
    assert read(config | {"rope_scaling": scaling}).max_context_tokens == tokens


def test_a_context_ends_where_attention_comes_in_chunks() -> None:
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    million = QWEN_2_5_7B | {"max_position_embeddings": 1010000}
    found = read(million | {"dual_chunk_attention_config": chunks})
    assert found.max_context_tokens == 262144 - 8192
    assert replace(found, max_positions=1010000) == read(million)
    short = QWEN_2_5_7B | {"max_position_embeddings": 4096, "dual_chunk_attention_config": chunks}
    assert read(short).max_context_tokens == 4096
    for wrong, part in (
        ({"chunk_size": 8, "local_size": 8}, "local_size takes all of chunk_size"),
        ({"local_size": 8}, "has no chunk_size"),
        (chunks | {"sparse_attention_config": {"a": 1}}, "sparse_attention_config"),
    ):
        changed = QWEN_2_5_7B | {"dual_chunk_attention_config": wrong}
        with pytest.raises(HanokError, match=part):
            read(changed)


def test_a_key_that_nobody_reads_is_refused_with_its_value() -> None:
    message = message_of(LLAMA_3_1_8B | {"attention_twist": 3, "use_cache": 1}, UnsupportedError)
    assert "a/config.json" in message
    assert "does not account for attention_twist = 3." in message
    assert "use_cache" not in message


def test_an_unknown_model_type_lists_the_known_ones_the_nearest_first() -> None:
    message = message_of(LLAMA_3_1_8B | {"model_type": "qwen3_moee"}, CheckpointError)
    assert "model_type 'qwen3_moee', which hanok does not know" in message
    listed = message.split("nearest first: ")[1].rstrip(".").split(", ")
    assert listed[0] == "qwen3_moe"
    assert sorted(listed) == sorted(families())


@pytest.mark.parametrize("value", [None, 7])
def test_a_file_without_a_model_type_says_what_is_known(value: object) -> None:
    message = message_of(LLAMA_3_1_8B | {"model_type": value}, CheckpointError)
    assert message == message_of(without(LLAMA_3_1_8B, "model_type"), CheckpointError)
    assert message.startswith("a/config.json has no `model_type`")
    assert all(name in message for name in families())


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "max_position_embeddings",
    ],
)
def test_a_missing_size_is_named(name: str) -> None:
    message = message_of(without(LLAMA_3_1_8B, name), CheckpointError)
    assert message == f"a/config.json has no {name}; llama needs it."
    # null is as good as absent
    assert message_of(LLAMA_3_1_8B | {name: None}, CheckpointError) == message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_size", "4096", "a positive whole number"),
        ("vocab_size", True, "a positive whole number"),
        ("num_hidden_layers", 0, "a positive whole number"),
        ("intermediate_size", 1.5, "a positive whole number"),
        ("rms_norm_eps", "small", "a number"),
        ("tie_word_embeddings", 1, "true or false"),
        ("attention_bias", "no", "true or false"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_and_shown(
    name: str, value: object, expected: str
) -> None:
    message = message_of(LLAMA_3_1_8B | {name: value}, CheckpointError)
    assert message == f"a/config.json: {name} is {value!r}; it must be {expected}."


def test_a_quantized_checkpoint_is_refused_by_its_method() -> None:
    quantized = QWEN3_30B_A3B | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    message = message_of(quantized, UnsupportedError)
    assert "quantized ('fp8')" in message
    assert "unquantized" in message


def test_an_activation_that_is_not_known_is_refused() -> None:
    message = message_of(LLAMA_3_1_8B | {"hidden_act": "mish"}, UnsupportedError)
    assert "activation 'mish' is not one of silu" in message


@pytest.mark.parametrize(
    ("scaling", "error", "part"),
    [
        ({"rope_type": "spiral"}, UnsupportedError, "rope type 'spiral' is not one of default"),
        ({"rope_type": "linear"}, CheckpointError, "'linear' is incomplete"),
        ({"rope_type": "llama3", "factor": 8.0}, CheckpointError, "low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "twist": 1}, UnsupportedError, "twist"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 64},
            CheckpointError,
            "short_factor has 3 values; 128 rotated components need 64",
        ),
        ({"factor": 2.0}, CheckpointError, "without a factor, or of a type"),
        ({"rope_type": "default", "factor": 2.0}, CheckpointError, "without a factor"),
        ({"rope_type": "linear", "factor": 0}, CheckpointError, "must be a number above 0"),
        ({"rope_type": "linear", "factor": float("nan")}, CheckpointError, "a number above 0"),
        ({"rope_type": "dynamic", "factor": "2"}, CheckpointError, "'dynamic' is '2'"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, CheckpointError, "beta_fast"),
    ],
)
def test_a_rope_that_cannot_be_read_says_why(
    scaling: dict[str, Any], error: type[HanokError], part: str
) -> None:
    assert part in message_of(LLAMA_3_1_8B | {"rope_scaling": scaling}, error)


@pytest.mark.parametrize(
    ("model_type", "changes", "error", "part"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError, "rotates whole heads"),
        ("qwen3", {"partial_rotary_factor": 0.25}, UnsupportedError, "rotates whole heads"),
        ("llama", {"hidden_activation": "relu"}, UnsupportedError, "hidden_activation = 'relu'"),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "silu"}, CheckpointError, "'silu'"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, UnsupportedError, "softcapping is 5.0"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            CheckpointError,
            "needs an object for sliding_attention",
        ),
        ("gpt_neox", {"rotary_emb_base": 100.0}, CheckpointError, "'rotary_emb_base': 100.0"),
        (
            "gpt_neox",
            {"rotary_pct": 0.25, "partial_rotary_factor": 0.5},
            CheckpointError,
            "'partial_rotary_factor': 0.5",
        ),
    ],
)
def test_what_a_family_would_compute_otherwise_is_refused(
    model_type: str, changes: dict[str, Any], error: type[HanokError], part: str
) -> None:
    plain = without(LLAMA_3_1_8B, "mlp_bias", "rope_scaling") | {"model_type": model_type}
    if model_type == "gpt_neox":
        plain = without(plain, "rms_norm_eps", "num_key_value_heads")
    if model_type.startswith("gemma"):
        plain = without(plain, "hidden_act")
    read(plain)
    assert part in message_of(plain | changes, error)


def test_gemmas_gelu_is_its_tanh_form() -> None:
    gemma = without(LLAMA_3_1_8B, "mlp_bias", "rope_scaling", "hidden_act") | {
        "model_type": "gemma"
    }
    for says, means in (
        ({}, "gelu_tanh"),
        ({"hidden_act": "gelu"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "relu"}, "relu"),
    ):
        assert read(gemma | says).layers[0].mlp.activation == means


def test_what_a_rope_leaves_empty_or_tells_of_its_training_is_no_matter() -> None:
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192}
    noted = yarn | {"finetuned": True, "attention_factor": None, "low_freq_factor": None}
    found = read(LLAMA_3_1_8B | {"rope_scaling": noted})
    assert found == read(LLAMA_3_1_8B | {"rope_scaling": yarn})
    assert read(LLAMA_3_1_8B | {"rope_scaling": {"type": None}}).layers[0].attention.rope == Rope(
        theta=500000.0, rotary_dim=128
    )


@pytest.mark.parametrize(
    "changes", [{"head_dim": 15}, {"model_type": "phi3", "partial_rotary_factor": 0.01}]
)
def test_what_is_rotated_comes_in_pairs(changes: dict[str, Any]) -> None:
    assert "rotated in pairs" in message_of(LLAMA_3_1_8B | changes, CheckpointError)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 71},
        {"model_type": "gpt2", "n_embd": 64, "n_head": 5},
        {"model_type": "gpt_bigcode", "n_embd": 64, "n_head": 128},
        {"model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 7},
    ],
)
def test_heads_share_the_hidden_size_evenly(config: dict[str, Any]) -> None:
    assert "do not share a hidden size of 64 evenly" in message_of(config, CheckpointError)


@pytest.mark.parametrize("config", [LLAMA_3_1_8B, MIXTRAL_8X7B, QWEN3_30B_A3B])
def test_the_new_spellings_mean_what_the_old_ones_do(config: dict[str, Any]) -> None:
    new = without(config, "rope_theta", "rope_scaling", "torch_dtype")
    new["dtype"] = config["torch_dtype"]
    new["rope_parameters"] = {
        "rope_theta": config["rope_theta"],
        **(config.get("rope_scaling") or {"rope_type": "default"}),
    }
    assert read(new) == read(config)
    # "type" is older still.
    if config.get("rope_scaling"):
        older = dict(config["rope_scaling"])
        older["type"] = older.pop("rope_type")
        assert read(config | {"rope_scaling": older}) == read(config)
    # And both matter.
    assert read(config | {"rope_theta": 7.0}) != read(config)
    assert read(config | {"torch_dtype": "float16"}) != read(config)
