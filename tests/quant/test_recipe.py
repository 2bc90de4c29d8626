"""What `--quant` says: every part of it, and each way to say it wrong."""

import pytest

from hanok.errors import OptionError
from hanok.quant.int4 import Int4
from hanok.quant.int8 import Int8
from hanok.quant.nf4 import Nf4
from hanok.quant.recipe import read_recipe

LINEAR, HEAD, EMBEDDING = "layers.0.mlp.down_proj.weight", "lm_head.weight", "embed_tokens.weight"


def test_options_belong_to_the_method_of_the_linear_layers() -> None:
    recipe = read_recipe("int4:group_size=64, symmetric=false")
    assert recipe.linears == Int4(group_size=64, symmetric=False)
    assert recipe.head == Int8()
    assert recipe.embedding is None
    assert recipe.text == "int4:group_size=64, symmetric=false"


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("int8", Int8()),
        ("int8:group_size=32", Int8(group_size=32)),
        ("nf4", Int8()),
        ("nf4:head=none", None),
        ("nf4:head=nf4,double_quant=true", Nf4(double_quant=True)),
        ("int8:head=int4", Int4()),
        ("int8-outlier", None),
    ],
)
def test_the_head_has_a_method_of_its_own(text: str, head: object) -> None:
    assert read_recipe(text).head == head


def test_each_weight_finds_its_method() -> None:
    recipe = read_recipe("int4")
    assert recipe.method_for(LINEAR, is_tied=False) == Int4()
    assert recipe.method_for(HEAD, is_tied=False) == Int8()
    assert recipe.method_for(EMBEDDING, is_tied=False) is None
    for name in ("norm.weight", "layers.0.attention_norm.weight", "layers.0.mlp.down_proj.bias"):
        assert recipe.method_for(name, is_tied=False) is None
    assert recipe.method_for("layers.0.mlp.router.weight", is_tied=False) is None


def test_a_tied_embedding_shares_the_heads_weight_unless_it_is_named() -> None:
    assert read_recipe("int4").method_for(EMBEDDING, is_tied=True) == Int8()
    assert read_recipe("int4:head=none").method_for(EMBEDDING, is_tied=True) is None
    named = read_recipe("int4:embedding=nf4")
    assert named.method_for(EMBEDDING, is_tied=True) == Nf4()
    assert not named.shares_embedding


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5", r"quantization 'int5' is unknown. Choose one of: int"),
        ("", "is unknown"),
        ("int4:group=64", "int4 has no option 'group'; its options: group_size"),
        ("int4:group_size", "'group_size' is not OPTION=VALUE"),
        ("int4:group_size=", "is not OPTION=VALUE"),
        ("int4:group_size=many", "int4:group_size is 'many'; write a number like 32"),
        ("int4:symmetric=maybe", "write true or false"),
        ("int4:head=int5", "'int5' is unknown"),
        ("fp8:group_size=32", "fp8 has no option 'group_size'; its options: none"),
    ],
)
def test_what_is_not_known_is_said(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_recipe(text)
