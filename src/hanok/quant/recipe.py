"""Which weights of a model are quantized, and how: what `--quant` and `hanok.load(quant=…)` say.

    int4                                    the linear layers; the head gets int8
    int4:group_size=64,symmetric=false      with options of the method
    int4:head=none,embedding=none           head and embedding are chosen separately

The head is a third of a small model's bytes and every token reads it whole; the embedding is only
looked up. Where the model ties them they stay one weight unless `embedding` says otherwise.
"""

from dataclasses import dataclass

from hanok.errors import OptionError
from hanok.quant.base import QuantMethod, method_of

# The method of the head where nothing else is said: wrong logits cost more than its bytes.
HEAD_METHODS = {"int4": "int8", "nf4": "int8", "int8-outlier": "none"}
NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The method of each kind of weight; None: not quantized."""

    linears: QuantMethod
    head: QuantMethod | None
    embedding: QuantMethod | None
    shares_embedding: bool = True
    """Whether a tied embedding looks up the head's quantized weight."""
    text: str
    names_head: bool = False
    """Whether the text has a choice for the head, which a base model does not have."""

    def method_for(self, parameter: str, *, is_tied: bool) -> QuantMethod | None:
        """Return the method that quantizes a parameter of `Decoder`; None: it is not quantized.

        A tied head is the parameter "embed_tokens.weight".
        """
        module, _, leaf = parameter.rpartition(".")
        if leaf != "weight":
            return None
        if module == "embed_tokens":
            return self.head if is_tied and self.shares_embedding else self.embedding
        if module == "lm_head":
            return self.head
        return self.linears if module.endswith("_proj") else None


def read_recipe(text: str) -> Recipe:
    """Read `METHOD[:OPTION=VALUE,…]`; OptionError says what is not known."""
    name, _, rest = text.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        option, equals, value = item.partition("=")
        if not equals or not value:
            raise OptionError(
                f"quantization {text!r}: {item!r} is not OPTION=VALUE. "
                "Write for example int4:group_size=64,head=int8."
            )
        options[option.strip()] = value.strip()
    names = frozenset(options)
    head = options.pop("head", HEAD_METHODS.get(name, ""))
    embedding = options.pop("embedding", "")
    linears = method_of(name, options)
    return Recipe(
        linears=linears,
        head=_other(head, linears),
        embedding=_other(embedding or NONE, linears),
        shares_embedding=not embedding,
        text=text,
        names_head="head" in names,
    )


def _other(name: str, linears: QuantMethod) -> QuantMethod | None:
    """Return the method of head or embedding: none, the linears' own, or one with its defaults."""
    if name == NONE:
        return None
    return linears if name in ("", linears.name) else method_of(name, {})
