"""config.json's keys: read with their types, and sorted into honoured, neutral, refused and unread.

Every key is one of these:

honoured    read with `Keys.take` here or in a family; it shapes the graph
neutral     transformers may read it, and it does not change what the model computes: `NEUTRAL`
refused     transformers reads it, it may change what the model computes, and it is not honoured: `ONLY`, except with
            the values listed there, which change nothing; and the attribute names of transformers' config class,
            which a key would replace: `OF_CLASS`
unread      none of these: transformers' code for the family does not read it. Accepted, and reported

tests/exporter/test_config_keys.py walks the installed transformers and fails if it reads a key that is not listed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwenport.contract import MOST_POSITIONS
from qwenport.exporter.errors import ConfigError

# Accepted, without effect.
NEUTRAL = frozenset(
    # identity and files
    "architectures model_type transformers_version _name_or_path name_or_path torch_dtype dtype "
    "tokenizer_class use_cache _attn_implementation _experts_implementation _commit_hash "
    "attn_implementation experts_implementation "
    # training
    "attention_dropout hidden_dropout residual_dropout classifier_dropout embd_pdrop resid_pdrop initializer_range "
    "initializer_factor init_std output_router_logits router_aux_loss_coef gradient_checkpointing "
    # outputs of the Python model, not of the function it computes
    "return_dict output_attentions output_hidden_states return_dict_in_generate torchscript "
    "use_return_dict chunk_size_feed_forward "
    # token ids and generation settings (generation_config.json decides those)
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens "
    # heads for other tasks
    "finetuning_task id2label label2id task_specific_params problem_type num_labels "
    "token_classification_bias loss_type "
    # compared with each other by transformers, and unused
    "embed_dim num_heads "
    # only has a meaning together with a key that is checked
    "max_window_layers".split()
)

# Read by transformers, not honoured here: only these values leave the function unchanged, as does a missing key.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),  # null is false to transformers: attention in both directions
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "attention_chunk_size": (None,),
    "per_layer_config": (None,),
    "kv_sharing_modes": (None,),
    "number_of_conv_states": (None,),
    "fusion_config": (None,),
    "transformers_weights": (None,),
    "distributed_config": (None,),
    # a nested config, which replaces the outer one
    "text_config": (None,),
    "decoder": (None,),
    "generator": (None,),
    "text_encoder": (None,),
    # scaled or capped logits
    "logits_mup_width_multiplier": (None,),
    "unpadded_vocab_size": (None,),
    # multi-token prediction heads; the tensors of a checkpoint that has them are refused by name
    "num_mtp_layers": (None, 0),
    "mtp_layer_types": (None,),
    "mtp_mlp_layer_types": (None,),
    "mtp_per_layer_config": (None,),
    "mtp_hidden_states_first": (None, False),
    "chain_hidden_post_norm": (None, False),
    "mlp_layer_types": (None,),
    "first_k_dense_replace": (None,),
}

# Methods and class attributes of transformers' config classes. A key of that name replaces the attribute, whatever it
# does: `attribute_map` renames other keys.
OF_CLASS = frozenset(
    "_auto_class _check_received_keys _decode_special_floats _dict_from_json_file _encode_special_floats "
    "_get_config_dict _get_files_timestamps _get_generation_parameters "
    "_getattr_without_heterogeneous_validation _hasattr_without_heterogeneous_validation "
    "_iter_config_keys_with_heterogeneous_adjustment _remove_keys_not_serialized "
    "_update_heterogeneous_to_dict_output _upload_modified_files _validate_axial_rope_parameters "
    "_validate_default_rope_parameters _validate_dynamic_rope_parameters _validate_linear_rope_parameters "
    "_validate_llama3_rope_parameters _validate_longrope_rope_parameters "
    "_validate_proportional_rope_parameters _validate_yarn_rope_parameters "
    "allow_global_per_layer_attribute_access attribute_map base_config_key base_model_ep_plan "
    "base_model_fsdp_plan base_model_pp_plan base_model_tp_plan convert_rope_params_to_dict "
    "default_config_fields default_rope_type default_theta dict_dtype_to_str extra_config_files extra_files "
    "from_dict from_json_file from_pretrained get_config_dict get_mtp_config get_text_config "
    "ignore_keys_at_rope_validation is_custom_code is_heterogeneous is_remote_code keys_to_ignore_at_inference "
    "nested_rope_parameter_keys per_layer_attributes push_to_hub register_for_auto_class save_pretrained "
    "serialize_explicit_per_layer_config standardize_rope_params sub_configs sub_configs_defaults to_dict "
    "to_diff_dict to_json_file to_json_string update update_from_string validate validate_architecture "
    "validate_layer_type validate_output_attentions validate_rope validate_token_ids".split()
)

# No published model comes near these: larger numbers are typos, or meant to exhaust memory.
MOST_BY_DEFAULT = 1 << 20
MOST = {
    "vocab_size": 1 << 24,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "num_experts": 1 << 13,
    "num_local_experts": 1 << 13,
    "max_position_embeddings": MOST_POSITIONS,
    "original_max_position_embeddings": MOST_POSITIONS,
}

_MISSING: Any = object()


class Keys:
    """The keys of one config.json; records which were read.

    A missing key takes the family's default, or is an error. A null takes the value of `null`, or is an error: the
    caller states what transformers' config class makes of it.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.raw, self.defaults = raw, defaults
        self.taken: set[str] = set()

    def take(
        self,
        key: str,
        kind: type | tuple[type, ...],
        *,
        default: Any = _MISSING,
        null: Any = _MISSING,
    ) -> Any:
        """A key's value, checked against these types.

        Args:
            key: its name.
            kind: one type or several; true and false are not numbers.
            default: value for a missing key without a family default.
            null: value for null.

        Raises:
            ConfigError: it is missing, null or of another type.
        """
        self.taken.add(key)
        value = self.raw.get(key, self.defaults.get(key, default))
        if value is _MISSING:
            raise ConfigError(f"config.json has no {key}")
        if value is None and null is not _MISSING:
            return null
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = "a number" if float in kinds else " or ".join(k.__name__ for k in kinds)
            raise ConfigError(f"config.json: {key} must be {expected}, found {short(value)}")
        return value

    def positive(self, key: str, *, default: Any = _MISSING, null: Any = _MISSING) -> Any:
        """A key's value, a positive integer within `MOST`."""
        value = self.take(key, int, default=default, null=null)
        if value is None:
            return value
        if value <= 0:
            raise ConfigError(f"config.json: {key} must be positive, found {short(value)}")
        if value > (most := MOST.get(key, MOST_BY_DEFAULT)):
            raise ConfigError(
                f"config.json: {key} {short(value)} is more than {most}; no model has so many"
            )
        return value

    def unread(self) -> tuple[str, ...]:
        """Keys that neither Qwenport nor transformers reads, sorted.

        Raises:
            ConfigError: a key that transformers reads has a value that is not honoured here.
        """
        left = self.raw.keys() - self.taken - NEUTRAL
        for key in sorted(left & OF_CLASS):
            raise ConfigError(
                f"config.json: {key} takes the place of an attribute of transformers' config class, "
                "which may change anything; remove it"
            )
        for key in sorted(left & ONLY.keys()):
            value = self.raw[key]
            if not any(
                value is each or (value == each and type(value) is type(each)) for each in ONLY[key]
            ):
                raise ConfigError(_refused(key, value))
        return tuple(sorted(left - ONLY.keys()))


def short(value: Any, most: int = 60) -> str:
    """A JSON value for a message, shortened."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of many digits"  # Python refuses to print some
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    told = repr(value)
    return told if len(told) <= most else told[: most - 3] + "..."


def _refused(key: str, value: Any) -> str:
    told = short(value)
    harmless = ", ".join(map(short, ONLY[key]))
    return f"config.json: {key} {told} changes what the model computes and is not supported; supported: {harmless}"
