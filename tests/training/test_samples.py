"""Samples of a model that is being trained: without dropout, and it goes on being trained."""

from pathlib import Path

import torch

import hanok
from hanok.training.samples import Sampler


def test_samples_are_without_dropout_and_leave_the_training_as_it_was(tmp_path: Path) -> None:
    model = hanok.load(hanok.BUNDLED, dtype="float32", weights="copied")
    lora = hanok.LoraConfig(r=4, lora_dropout=0.9, target_modules="all-linear")
    trainer = hanok.Trainer(model, hanok.TrainOptions(lora=lora), tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name, item in model.decoder.named_parameters():
        if ".b." in name:
            item.data.normal_(std=0.1, generator=generator)
    model.weights_changed()
    prompts = ("Once", "Lily saw", "One day")
    sampler = Sampler(model, prompts, max_tokens=12, is_chat=False, template=None)
    model.decoder.eval()
    expected = [model.generate(p, max_new_tokens=12, temperature=0.0).text for p in prompts]
    model.decoder.train()
    before = torch.get_rng_state()
    assert [item.text for item in sampler.samples(1)] == expected
    assert trainer.model.decoder.training
    assert torch.equal(torch.get_rng_state(), before)
