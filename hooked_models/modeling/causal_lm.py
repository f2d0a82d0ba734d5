"""The parts that the language models of this package share: cache, model around the blocks, unembedding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hooked_models.caches import refuse_unknown
from hooked_models.errors import HookedModelError


class RecurrentCache(DynamicCache):
    """A cache with a recurrent state in some layers, which counts the tokens that it has seen.

    Args:
        layers: of transformers' kinds, in the order of the model's.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers = layers
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def crop(self, tokens_to_remove: int) -> None:
        raise HookedModelError(
            "a recurrent state cannot be rolled back: keep copy.deepcopy(cache) of the point to go back to"
        )

    def activate_past_recording(self) -> None:
        self.crop(0)

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0


def masked(
    hidden: Float[Tensor, "batch pos size"], attention_mask: Int[Tensor, "batch all_pos"] | None
) -> Float[Tensor, "batch pos size"]:
    """The input with zeros at padded positions, which then write nothing and shift in nothing."""
    if attention_mask is None or attention_mask.ndim != 2:
        return hidden
    return hidden.masked_fill(attention_mask[:, -hidden.shape[1] :, None] == 0, 0)


class RecurrentModel(PreTrainedModel):
    """A model up to its last hidden state: ``embeddings``, blocks and ``norm``, which a subclass builds."""

    embeddings: nn.Module
    norm: nn.Module
    gradient_checkpointing = False

    @abstractmethod
    def new_cache(self) -> RecurrentCache:
        """An empty cache of the kind that the layers take."""

    @abstractmethod
    def run_layers(
        self,
        hidden: Float[Tensor, "batch pos size"],
        cache: RecurrentCache | None,
        attention_mask: Any,
        position_ids: Int[Tensor, "rows pos"] | None,
    ) -> Iterator[Float[Tensor, "batch pos size"]]:
        """The residual stream after each block in turn."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | Tensor | dict[str, Tensor | None] | None = None,
        inputs_embeds: Float[Tensor, "batch pos size"] | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Int[Tensor, "rows pos"] | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        config: Any = self.config
        refuse_unknown(options, f"a {config.model_type} model")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (config.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:  # as in transformers: layers run twice
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if past_key_values is not None and not isinstance(past_key_values, RecurrentCache):
            needed = type(self.new_cache()).__name__
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: a {config.model_type} model needs "
                f"a {needed}"
            )
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        hidden_states, residual = [hidden], hidden
        for residual in self.run_layers(hidden, past_key_values, attention_mask, position_ids):
            if output_hidden_states:
                hidden_states.append(residual)
        hidden = self.norm(residual)
        if past_key_values is not None:
            past_key_values.seen_tokens += hidden.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states[:-1], hidden) if output_hidden_states else None,
        )


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model: ``model``, a `RecurrentModel`, and ``lm_head``, which a subclass builds."""

    model: RecurrentModel
    lm_head: nn.Linear
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its cache itself

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: RecurrentCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Cut the inputs down to the tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        options: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache}
        options["attention_mask"] = attention_mask
        if inputs_embeds is None:
            return {"input_ids": input_ids[:, seen:], **options}
        if not seen:
            return {"inputs_embeds": inputs_embeds, **options}
        # Callers differ in whether ``input_ids`` begins with the embedded prompt, so only its end is used.
        return {"input_ids": input_ids[:, -1:], **options}

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | Tensor | dict[str, Tensor | None] | None = None,
        inputs_embeds: Float[Tensor, "batch pos size"] | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, " position"] = 0,
        position_ids: Int[Tensor, "rows pos"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and loss, with the arguments of transformers' causal language models.

        ``labels`` are the input ids themselves: they are shifted by one token here.
        """
        config: Any = self.config
        if labels is None:
            refuse_unknown(kwargs, f"a {config.model_type} model")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
