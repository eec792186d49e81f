"""Parameters and operations of BERT-base, dense and compressed, reproduce the paper's figures; no memory is used."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from kron_kernels.convert.counting import count_parameters, linear_flops
from kron_kernels.models import KronBertConfig, KronBertForMaskedLM, KronBertModel


def make_bert_base(name: str | None, **options) -> nn.Module:
    with torch.device("meta"):
        if name is None:
            return BertModel(BertConfig(), **options)
        return KronBertModel(KronBertConfig(kron=name), **options)


@pytest.mark.parametrize(
    ("name", "with_pooler", "without_pooler", "flops"),
    [
        (None, 109_482_240, 108_891_648, 21_732_655_104),
        ("K8", 14_654_216, 14_063_624, 5_474_746_368),
        ("K21", 5_228_272, 4_637_680, 1_403_191_296),
    ],
)
def test_bert_base(name, with_pooler, without_pooler, flops):
    model = make_bert_base(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count_parameters(model) == with_pooler
    assert count_parameters(make_bert_base(name, add_pooling_layer=False)) == without_pooler
    assert linear_flops(model, 128) == flops


def test_a_tied_decoder_adds_only_the_head():
    with torch.device("meta"):
        dense, kron = BertForMaskedLM(BertConfig()), KronBertForMaskedLM(KronBertConfig(kron="K8"))
    head = 768 * 768 + 3 * 768 + 30522
    assert count_parameters(dense) == 108_891_648 + head
    assert count_parameters(kron) == 14_063_624 + head
