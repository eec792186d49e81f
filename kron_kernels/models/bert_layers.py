"""BERT's blocks through the fused ops: the same modules and parameters, in the same places, computed in fewer steps.

Each class here derives from the transformers class whose work it does and holds nothing of its own, so ``fuse_``
changes no more than a module's class: names, state dicts and recorded outputs stay. Whatever the fused ops do not
cover goes through the modules themselves, one layer at a time: a layer that is dense or replaced, one with a hook that
would have to be called, a decoder, an active dropout.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertIntermediate,
    BertLayer,
    BertModel,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
    eager_attention_forward,
)
from transformers.pytorch_utils import apply_chunking_to_forward

from ..nn import KronEmbedding
from ..ops import AddNorm, kron_embedding
from ..schemas.reference import index_error
from ..schemas.registry import HUGGING_FACE_ACTIVATIONS
from ..schemas.torch_internals import needs_autograd
from .blocks import are_factored, ffn, is_unhooked, matmul_norm, project
from .padding import Packing, remove_padding

_Model = TypeVar("_Model", bound=nn.Module)

# transformers' activations by class.
_ACTIVATIONS = {type(ACT2FN[theirs]): ours for theirs, ours in HUGGING_FACE_ACTIVATIONS.items()}


def _norm_of(module: Any, factors: Any) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and eps of a plain LayerNorm in the dtype of a Kronecker layer, else None."""
    if type(module) is not nn.LayerNorm or not is_unhooked(module):
        return None
    tensors = module._parameters or module._buffers  # nn.Module's attribute look-up costs as much as a small op
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or bias is None or weight.dtype is not factors.dtype:
        return None
    return weight, bias, module.eps


def _drops(module: Any) -> bool:
    """Whether a dropout does anything, or has a hook to be called."""
    return type(module) is not nn.Dropout or (module.training and module.p > 0) or not is_unhooked(module)


class FusedBertEmbeddings(BertEmbeddings):
    """Word, position and type rows and their norm in one pass, where the word embedding is a KronEmbedding."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_length: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        if inputs_embeds is not None:
            self._check_shape("inputs_embeds", inputs_embeds, 3, position_ids, cache_length)
        elif input_ids is not None:
            self._check_shape("input_ids", input_ids, 2, position_ids, cache_length)
        if cache_length:
            kwargs["cache_length"] = cache_length
        try:
            if input_ids is None or inputs_embeds is not None or cache_length or not self._fusable():
                operands: Any = (input_ids, token_type_ids, position_ids, inputs_embeds)
                return super().forward(*operands, **kwargs)
            return self.dropout(self._embed(input_ids, token_type_ids, position_ids))
        except (IndexError, RuntimeError) as error:
            for name, index, table in (
                ("input_ids", input_ids, self.word_embeddings),
                ("position_ids", position_ids, self.position_embeddings),
                ("token_type_ids", token_type_ids, self.token_type_embeddings),
            ):
                outside = None if index is None else index_error(name, index, table.num_embeddings)
                if outside is not None:
                    raise outside from error
            raise

    def _check_shape(
        self, name: str, given: Tensor, dimensions: int, position_ids: Tensor | None, cache_length: int
    ) -> None:
        shape = given.shape
        if len(shape) != dimensions or shape[0] == 0 or shape[1] == 0:
            raise ValueError(
                f"{name}: expected shape (batch, length{', hidden' * (dimensions - 2)}) with at least one sequence of "
                f"at least one token, got {tuple(shape)}"
            )
        table = self.position_embeddings.num_embeddings
        if position_ids is None and cache_length + shape[1] > table:
            raise ValueError(
                f"{name}: expected sequences of at most {table} tokens (max_position_embeddings), "
                f"got {cache_length + shape[1]}"
            )

    def _fusable(self) -> bool:
        words: Any = self.word_embeddings
        return (
            type(words) is KronEmbedding
            and is_unhooked(words)
            # The op gives a gradient to every row that it reads, a padding row too.
            and (words.padding_idx is None or not needs_autograd(words.a, words.b))
            and all(
                type(table) is nn.Embedding and is_unhooked(table) and table.weight.dtype is words.a.dtype
                for table in (self.position_embeddings, self.token_type_embeddings)
            )
            and _norm_of(self.LayerNorm, words) is not None
        )

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        words: Any = self.word_embeddings
        norm = self.LayerNorm
        return kron_embedding(
            input_ids,
            words.a,
            words.b,
            position_ids=self.position_ids[:, : input_ids.shape[1]] if position_ids is None else position_ids,
            position_weight=self.position_embeddings.weight,
            # The buffer holds zeros.
            type_ids=self.token_type_ids[:, :1] if token_type_ids is None else token_type_ids,
            type_weight=self.token_type_embeddings.weight,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
        )


class FusedBertSelfAttention(BertSelfAttention):
    """Queries, keys and values from one read of the input; attention itself as transformers is told to do it."""

    takes_packing = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        *,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.is_decoder or cache is not None:
            return super().forward(hidden_states, attention_mask, cache=cache, **kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs["dropout"] = self.dropout.p if self.training else 0.0
        kwargs["scaling"] = self.scaling
        modules: Any = self._modules
        projected = project(hidden_states, (modules["query"], modules["key"], modules["value"]))
        lead = hidden_states.shape[:-1]
        if packing is None:
            heads = (*lead, -1, self.attention_head_size)
            query, key, value = [each.view(heads).transpose(1, 2) for each in projected]
            context, weights = attend(self, query, key, value, attention_mask, **kwargs)
            return context.reshape(*lead, -1), weights
        contexts = [
            attend(self, query, key, value, None, **kwargs)[0].flatten(2).flatten(0, 1)
            for query, key, value in packing.sequences(projected, self.attention_head_size)
        ]
        return torch.cat(contexts).unsqueeze(0), None


class _FusedOutput(nn.Module):
    """The end of a block: a product, the residual and the norm in one op."""

    dense: nn.Module
    dropout: nn.Module
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        modules: Any = self._modules
        dense = modules["dense"]
        norm = _norm_of(modules["LayerNorm"], dense) if are_factored(dense) else None
        if norm is None or _drops(modules["dropout"]):
            return super().forward(hidden_states, input_tensor)
        return matmul_norm(hidden_states, dense, AddNorm(input_tensor, *norm))


class FusedBertSelfOutput(_FusedOutput, BertSelfOutput):
    """The output projection of attention."""


class FusedBertOutput(_FusedOutput, BertOutput):
    """The second half of the feed-forward block, where the first has to run by itself."""


class FusedBertLayer(BertLayer):
    """Attention, then the whole feed-forward block as one op."""

    takes_packing = True

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_decoder:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        modules: Any = self._modules
        attention = modules["attention"]
        # The arguments left out here serve cross-attention, which an encoder has not.
        kwargs.pop("encoder_attention_mask", None)
        if type(attention) is BertAttention and is_unhooked(attention):
            parts: Any = attention._modules
            context, _ = parts["self"](hidden_states, attention_mask, **kwargs)
            hidden_states = parts["output"](context, hidden_states)
        else:
            hidden_states, _ = attention(hidden_states, attention_mask, **kwargs)
        if self.chunk_size_feed_forward == 0:
            return self.feed_forward_chunk(hidden_states)
        return apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, hidden_states
        )

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        modules: Any = self._modules
        intermediate, output = modules["intermediate"], modules["output"]
        activation = _activation_of(intermediate)
        if activation is None or type(output) is not FusedBertOutput or not is_unhooked(output):
            return super().feed_forward_chunk(attention_output)
        parts: Any = output._modules
        layers = (intermediate._modules["dense"], parts["dense"])
        layer_norm, dropout = parts["LayerNorm"], parts["dropout"]
        norm = _norm_of(layer_norm, layers[1]) if are_factored(*layers) else None
        if norm is None:
            return super().feed_forward_chunk(attention_output)
        if _drops(dropout):
            y = ffn(attention_output, *layers, activation, None)
            return layer_norm(dropout(y) + attention_output)
        return ffn(attention_output, *layers, activation, AddNorm(attention_output, *norm))


def _activation_of(intermediate: Any) -> str | None:
    """The ops' name for the activation of a first half that may be fused, else None."""
    if type(intermediate) is not BertIntermediate or not is_unhooked(intermediate):
        return None
    function: Any = intermediate.intermediate_act_fn
    name = _ACTIVATIONS.get(type(function))
    return name if name is not None and is_unhooked(function) else None


class FusedBertEncoder(BertEncoder):
    """The layers, and after them the tokens' places in the batch where padding was left out."""

    takes_packing = True

    def forward(self, hidden_states: Tensor, *args: Any, packing: Packing | None = None, **kwargs: Any) -> Any:
        if packing is None:
            return super().forward(hidden_states, *args, **kwargs)
        result = super().forward(hidden_states, *args, packing=packing, **kwargs)
        result.last_hidden_state = packing.unpack(result.last_hidden_state)
        return result


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BertEmbeddings: FusedBertEmbeddings,
    BertSelfAttention: FusedBertSelfAttention,
    BertSelfOutput: FusedBertSelfOutput,
    BertOutput: FusedBertOutput,
    BertLayer: FusedBertLayer,
    BertEncoder: FusedBertEncoder,
}


def fuse_(model: _Model) -> _Model:
    """Let a BERT with Kronecker layers, ``kronify_``'s say, compute through the fused ops; in place, and returned.

    ``model`` is transformers' BertModel or one with a head on it. Parameters, names and files stay as they are; layers
    that have no Kronecker factors work as before. KronBert models come like this. Batches with padding are computed
    without it, as docs/inference.md says, unless ``model.config.padding_free`` is False. Doing it twice changes
    nothing. Raises TypeError for a model without a BertModel.
    """
    encoders = [module for module in model.modules() if isinstance(module, BertModel)]
    if not encoders:
        raise TypeError(f"model: expected a BertModel of transformers or one with a head, got {type(model).__name__}")
    for encoder in encoders:
        for module in encoder.modules():
            module.__class__ = _FUSED.get(type(module), type(module))
        if remove_padding not in encoder._forward_pre_hooks.values():
            encoder.register_forward_pre_hook(remove_padding, with_kwargs=True)
    return model
