# SPDX-License-Identifier: Apache-2.0
"""A safety mix in TRL's trainer: the same tokens, the same tokens with loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.harden.safety_mix import conversations, mix
from keelwright.training.rows import IGNORED, batch_of, encode_rows
from keelwright.worlds.workshop.materials import workshop_rows
from keelwright.worlds.workshop.tokenizer import workshop_tokenizer


def test_trl_trains_on_the_tokens_that_the_loop_trains_on(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer, lab = workshop_tokenizer(), workshop_rows(0, user=5, hardening=8)
    rows = mix(lab.user, lab.safety, lab.borderline, k=2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    settings = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(conversations(rows)),
        processing_class=tokenizer,
    )
    ours = batch_of(encode_rows(tokenizer, rows, module=model), pad_id=tokenizer.pad_token_id)
    theirs = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
    assert len(rows) == 9
    assert (theirs["input_ids"] == ours.input_ids).all()
    assert (theirs["labels"] == ours.labels).all()
    assert (ours.labels != IGNORED).any(1).all()
