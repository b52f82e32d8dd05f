"""OneFormer (Jain et al. 2022) on Swin: Mask2Former's decoders, whose queries begin from the task's text.

Official code: SHI-Labs/OneFormer @ 4962ef6. The text "the task is semantic" is 77 token ids that go as numbers through
two linear layers; the task's token and the queries made of it (by two layers of DETR's decoder over the mask features)
take the place of learned query features. Text encoder and prompts are of training only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.kernels.constants import constant
from ade_harness.models.backbones.swin import SWIN_FIELDS, build_swin, read_swin, swin_channels
from ade_harness.models.checkpoint.family import Family, count
from ade_harness.models.checkpoint.key_tables import Table
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.formats.transformers import ONEFORMER_TASKS, ONEFORMER_TEXT_LENGTH
from ade_harness.models.heads.mask2former import HEAD_FIELDS, QueryDecoder, build_head, read_head, sine_positions
from ade_harness.models.heads.mask2former_keys import PIXEL_LEVEL_HUB
from ade_harness.models.heads.mask_classifier import assemble, split
from ade_harness.models.outputs import MaskLogits
from ade_harness.models.systems.mask2former import SWIN_DETECTRON2, with_pixel_decoder
from ade_harness.models.systems.maskformer import DetrDecoder, detr_decoder


class TaskDecoder(QueryDecoder):
    """Mask2Former's decoder whose queries begin from a task.

    Args:
        classes: number of classes, without "no object".
        queries: number of queries, the task's included.
        width: of queries and maps.
        mask_width: of the mask features.
        heads: of attention.
        hidden: between the two linear layers.
        layers: number of layers.
        class_layers: layers of the decoder that makes queries of the task.
        class_hidden: between its two linear layers.
        task: token ids.
    """

    def __init__(
        self, classes: int, queries: int, width: int, mask_width: int, heads: int, hidden: int, layers: int,
        class_layers: int, class_hidden: int, task: Sequence[int],
    ) -> None:  # fmt: skip
        super().__init__(classes, queries, width, mask_width, heads, hidden, layers)
        del self.query_features
        self.task = tuple(task)
        self.task_mlp = nn.Sequential(nn.Linear(ONEFORMER_TEXT_LENGTH, width), nn.ReLU(), nn.Linear(width, width))
        self.class_projection = nn.Conv2d(mask_width, width, 1)
        self.class_transformer = DetrDecoder(width, heads, class_hidden, class_layers)

    def forward(self, mask_features: Tensor, maps: Sequence[Tensor]) -> MaskLogits:
        """Return the last layer's class and mask logits."""
        padded = (*self.task, *[0] * (ONEFORMER_TEXT_LENGTH - len(self.task)))
        ids = constant((padded,), mask_features.device, self.query_positions.dtype)
        task = self.norm(self.task_mlp(ids)).expand(mask_features.shape[0], 1, -1)
        start = task.expand(-1, self.query_positions.shape[0] - 1, -1)
        projected = self.class_projection(mask_features)
        positions = sine_positions(projected.shape[2], projected.shape[3], projected.shape[1], projected.device).to(
            projected.dtype
        )
        memory = positions.expand(projected.shape[0], -1, -1)  # the official code hands the two over in this order:
        keys = projected.flatten(2).transpose(1, 2)  # values are the positions, keys the sum of both
        made = self.class_transformer(start, self.query_positions[:-1], memory, keys)
        return self.attend(torch.cat([made, task.to(made.dtype)], 1), mask_features, maps)


_PREDICTOR = "sem_seg_head.predictor."
OFFICIAL: Table = (
    ("task_mlp.layers.0.*", "decoder.task_mlp.0.*"),
    ("task_mlp.layers.1.*", "decoder.task_mlp.2.*"),
    (_PREDICTOR + "class_input_proj.*", "decoder.class_projection.*"),
    *detr_decoder(_PREDICTOR + "class_transformer.decoder.", "decoder.class_transformer."),
    *((f"{part}.*", None) for part in ("text_encoder", "text_projector", "prompt_ctx")),  # of training only
    ("prompt_ctx", None),
    *SWIN_DETECTRON2,
)

_LAYER = "model.transformer_module.decoder.layers.{L}."
_CLASS = "model.transformer_module.decoder.query_transformer.decoder."
HUB: Table = (
    *PIXEL_LEVEL_HUB,
    (_LAYER + "cross_attn.cross_attn.in_proj_weight", "decoder.layers.{L}.cross_attention.{q|k|v}.weight"),
    (_LAYER + "cross_attn.cross_attn.in_proj_bias", "decoder.layers.{L}.cross_attention.{q|k|v}.bias"),
    (_LAYER + "cross_attn.cross_attn.out_proj.*", "decoder.layers.{L}.cross_attention.out.*"),
    (_LAYER + "cross_attn.multihead_attn.in_proj_weight", "decoder.layers.{L}.cross_attention.{q|k|v}.weight"),
    (_LAYER + "cross_attn.multihead_attn.in_proj_bias", "decoder.layers.{L}.cross_attention.{q|k|v}.bias"),
    (_LAYER + "cross_attn.multihead_attn.out_proj.*", "decoder.layers.{L}.cross_attention.out.*"),
    (_LAYER + "cross_attn.norm.*", "decoder.layers.{L}.cross_norm.*"),
    (_LAYER + "self_attn.self_attn.q_proj.*", "decoder.layers.{L}.self_attention.q.*"),
    (_LAYER + "self_attn.self_attn.k_proj.*", "decoder.layers.{L}.self_attention.k.*"),
    (_LAYER + "self_attn.self_attn.v_proj.*", "decoder.layers.{L}.self_attention.v.*"),
    (_LAYER + "self_attn.self_attn.out_proj.*", "decoder.layers.{L}.self_attention.out.*"),
    (_LAYER + "self_attn.norm.*", "decoder.layers.{L}.self_norm.*"),
    (_LAYER + "ffn.linear{N}.*", "decoder.layers.{L}.linear{N}.*"),
    (_LAYER + "ffn.norm.*", "decoder.layers.{L}.norm.*"),
    *detr_decoder(_CLASS, "decoder.class_transformer."),
    ("model.transformer_module.decoder.query_input_projection.*", "decoder.class_projection.*"),
    ("model.transformer_module.decoder.decoder_norm.*", "decoder.norm.*"),
    ("model.transformer_module.decoder.class_embed.*", "decoder.classes.*"),
    ("model.transformer_module.decoder.mask_embed.layers.0.0.*", "decoder.mask_embed.0.*"),
    ("model.transformer_module.decoder.mask_embed.layers.1.0.*", "decoder.mask_embed.2.*"),
    ("model.transformer_module.decoder.mask_embed.layers.2.0.*", "decoder.mask_embed.4.*"),
    ("model.transformer_module.queries_embedder.weight", "decoder.query_positions"),
    ("model.transformer_module.level_embed.weight", "decoder.level_embed"),
    ("model.task_encoder.task_mlp.layers.0.0.*", "decoder.task_mlp.0.*"),
    ("model.task_encoder.task_mlp.layers.1.0.*", "decoder.task_mlp.2.*"),
    *((f"model.{part}.*", None) for part in ("text_mapper",)),  # of training only
    ("criterion.*", None),
    ("matcher.*", None),
)


def _read(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        **read_swin(state),
        **read_head(state),
        "class_layers": count(state, "decoder.class_transformer.layers.{N}."),
        "class_hidden": state["decoder.class_transformer.layers.0.linear1.weight"].shape[0],
    }


def _build(fields: dict[str, Any], state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    backbone, rest = split(state, "backbone.")
    task = fields.get("task", "semantic")
    if task not in ONEFORMER_TASKS:
        raise ValueError(f"task={task}: choose {', '.join(ONEFORMER_TASKS)}")

    def head() -> dict[str, nn.Module]:
        width = fields["width"]
        decoder = TaskDecoder(
            fields["num_labels"], fields["queries"], width, fields.get("mask_width") or width, fields["heads"],
            fields["query_hidden"], fields["query_layers"], fields["class_layers"], fields["class_hidden"],
            ONEFORMER_TASKS[task],
        )  # fmt: skip
        return {**build_head(swin_channels(fields), fields), "decoder": decoder}

    return assemble(build_swin(fields, backbone, keys), head, rest, keys)


ONEFORMER = Family(
    layouts={"official": OFFICIAL, "hub": HUB},
    prepare=with_pixel_decoder,
    unused=("*.relative_position_index",),
    read=_read,
    build=_build,
    backbone_fields=SWIN_FIELDS,
    head_fields=(*HEAD_FIELDS, "class_layers", "class_hidden", "task"),
    classifier="decoder.classes.weight",
    void=True,
)
