"""How the model goes on from some prompts while it learns, greedily: always the likeliest token."""

from collections.abc import Sequence

from hanok.engine.model import Model
from hanok.training.callback import Sample


class Sampler:
    """Continues prompts with what has been learnt so far; the training goes on as without it."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        is_chat: bool,
        template: str | None,
    ) -> None:
        """Where `is_chat`, a prompt is a question rendered with `template`, else a text as it is."""
        self._model = model
        self._max_tokens = max_tokens
        self._prompts = {prompt: self._encoded(prompt, template, is_chat) for prompt in prompts}

    def samples(self, step: int) -> list[Sample]:
        """Return the continuations after a step."""
        decoder = self._model.decoder
        was_training = decoder.training
        decoder.eval()
        try:
            texts = [
                self._model.generate(
                    ids, max_new_tokens=self._max_tokens, temperature=0.0, repetition_penalty=1.0
                ).text
                for ids in self._prompts.values()
            ]
        finally:
            decoder.train(was_training)
        return [
            Sample(step=step, prompt=prompt, text=text)
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]

    def _encoded(self, prompt: str, template: str | None, is_chat: bool) -> list[int]:
        tokenizer = self._model.tokenizer
        if not is_chat or tokenizer is None:
            return self._model.encode(prompt)
        message = {"role": "user", "content": prompt}
        # The model checks that the ids are its own.
        return self._model.encode(tokenizer.encode_chat([message], template=template))
