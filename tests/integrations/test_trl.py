"""TRL's SFTTrainer, where it is installed: the losses of our experts are those of transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import moe_triton
from tests.helpers.families import VOCAB, only_ours, tiny_model
from tests.integrations.test_trainer import TRAINED

trl = pytest.importorskip("trl")


def losses(family: str, with_peft: bool, ours: bool, folder: str) -> list[float]:
    from datasets import Dataset

    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<pad>": VOCAB - 2, "<eos>": VOCAB - 1}
    tokenizer: Any = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    rows = torch.randint(0, VOCAB - 2, (4, 8), generator=torch.Generator().manual_seed(7))
    data = Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in rows.tolist()]})
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapters = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names) if with_peft else None
    model = tiny_model(family)
    if ours:
        assert moe_triton.swap(model).swapped
    torch.manual_seed(2)
    arguments = trl.SFTConfig(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        max_length=16,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapters)
    if ours:
        with only_ours(model):
            trainer.train()
    else:
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("with_peft", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize("family", TRAINED)
def test_losses_equal_eagers(family, with_peft, tmp_path):
    expected = torch.tensor(losses(family, with_peft, False, str(tmp_path)))
    actual = torch.tensor(losses(family, with_peft, True, str(tmp_path)))
    assert expected[-1] < expected[0]
    assert (actual / expected - 1).abs().max() <= 1e-6
