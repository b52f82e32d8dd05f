"""Names of Mask2Former's head in the published lineages: of detectron2, mmdetection, DINOv3 and transformers."""

from __future__ import annotations

from ade_harness.models.checkpoint.key_tables import Table

HEAD_DETECTRON2: Table = (
    ("sem_seg_head.pixel_decoder.input_proj.{I}.0.*", "pixel_decoder.input_projections.{I}.conv.*"),
    ("sem_seg_head.pixel_decoder.input_proj.{I}.1.*", "pixel_decoder.input_projections.{I}.norm.*"),
    ("sem_seg_head.pixel_decoder.transformer.level_embed", "pixel_decoder.level_embed"),
    (
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.{L}.self_attn.*",
        "pixel_decoder.layers.{L}.attention.*",
    ),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{L}.*", "pixel_decoder.layers.{L}.*"),
    ("sem_seg_head.pixel_decoder.adapter_1.norm.*", "pixel_decoder.lateral.norm.*"),
    ("sem_seg_head.pixel_decoder.adapter_1.*", "pixel_decoder.lateral.conv.*"),
    ("sem_seg_head.pixel_decoder.layer_1.norm.*", "pixel_decoder.output.norm.*"),
    ("sem_seg_head.pixel_decoder.layer_1.*", "pixel_decoder.output.conv.*"),
    ("sem_seg_head.pixel_decoder.mask_features.*", "pixel_decoder.mask_features.*"),
    ("criterion.*", None),  # of training only
)


def query_decoder_detectron2(prefix: str, norm: str = "decoder_norm") -> Table:
    """Return the table of the decoder as detectron2's lineage names it, and DINOv3."""
    layers = prefix + "transformer_{}_layers.{{L}}."
    cross, own, ffn = (layers.format(kind) for kind in ("cross_attention", "self_attention", "ffn"))
    return (
        (cross + "multihead_attn.in_proj_weight", "decoder.layers.{L}.cross_attention.{q|k|v}.weight"),
        (cross + "multihead_attn.in_proj_bias", "decoder.layers.{L}.cross_attention.{q|k|v}.bias"),
        (cross + "multihead_attn.out_proj.*", "decoder.layers.{L}.cross_attention.out.*"),
        (cross + "norm.*", "decoder.layers.{L}.cross_norm.*"),
        (own + "self_attn.in_proj_weight", "decoder.layers.{L}.self_attention.{q|k|v}.weight"),
        (own + "self_attn.in_proj_bias", "decoder.layers.{L}.self_attention.{q|k|v}.bias"),
        (own + "self_attn.out_proj.*", "decoder.layers.{L}.self_attention.out.*"),
        (own + "norm.*", "decoder.layers.{L}.self_norm.*"),
        (ffn + "*", "decoder.layers.{L}.*"),
        (prefix + norm + ".*", "decoder.norm.*"),
        (prefix + "query_feat.weight", "decoder.query_features"),
        (prefix + "static_query.weight", "decoder.query_features"),  # in files of Mask2Former's first weeks
        (prefix + "query_embed.weight", "decoder.query_positions"),
        (prefix + "level_embed.weight", "decoder.level_embed"),
        (prefix + "class_embed.*", "decoder.classes.*"),
        (prefix + "mask_embed.layers.0.*", "decoder.mask_embed.0.*"),
        (prefix + "mask_embed.layers.1.*", "decoder.mask_embed.2.*"),
        (prefix + "mask_embed.layers.2.*", "decoder.mask_embed.4.*"),
    )


_MM_PIXEL = "decode_head.pixel_decoder."
_MM_LAYER = "decode_head.transformer_decoder.layers.{L}."
HEAD_MMDETECTION: Table = (
    (_MM_PIXEL + "input_convs.{I}.conv.*", "pixel_decoder.input_projections.{I}.conv.*"),
    (_MM_PIXEL + "input_convs.{I}.gn.*", "pixel_decoder.input_projections.{I}.norm.*"),
    (_MM_PIXEL + "level_encoding.weight", "pixel_decoder.level_embed"),
    (_MM_PIXEL + "encoder.layers.{L}.attentions.0.*", "pixel_decoder.layers.{L}.attention.*"),
    (_MM_PIXEL + "encoder.layers.{L}.ffns.0.layers.0.0.*", "pixel_decoder.layers.{L}.linear1.*"),
    (_MM_PIXEL + "encoder.layers.{L}.ffns.0.layers.1.*", "pixel_decoder.layers.{L}.linear2.*"),
    (_MM_PIXEL + "encoder.layers.{L}.norms.{N}.*", "pixel_decoder.layers.{L}.norm{N+1}.*"),
    (_MM_PIXEL + "lateral_convs.0.conv.*", "pixel_decoder.lateral.conv.*"),
    (_MM_PIXEL + "lateral_convs.0.gn.*", "pixel_decoder.lateral.norm.*"),
    (_MM_PIXEL + "output_convs.0.conv.*", "pixel_decoder.output.conv.*"),
    (_MM_PIXEL + "output_convs.0.gn.*", "pixel_decoder.output.norm.*"),
    (_MM_PIXEL + "mask_feature.*", "pixel_decoder.mask_features.*"),
    (_MM_LAYER + "attentions.0.attn.in_proj_weight", "decoder.layers.{L}.cross_attention.{q|k|v}.weight"),
    (_MM_LAYER + "attentions.0.attn.in_proj_bias", "decoder.layers.{L}.cross_attention.{q|k|v}.bias"),
    (_MM_LAYER + "attentions.0.attn.out_proj.*", "decoder.layers.{L}.cross_attention.out.*"),
    (_MM_LAYER + "attentions.1.attn.in_proj_weight", "decoder.layers.{L}.self_attention.{q|k|v}.weight"),
    (_MM_LAYER + "attentions.1.attn.in_proj_bias", "decoder.layers.{L}.self_attention.{q|k|v}.bias"),
    (_MM_LAYER + "attentions.1.attn.out_proj.*", "decoder.layers.{L}.self_attention.out.*"),
    (_MM_LAYER + "ffns.0.layers.0.0.*", "decoder.layers.{L}.linear1.*"),
    (_MM_LAYER + "ffns.0.layers.1.*", "decoder.layers.{L}.linear2.*"),
    (_MM_LAYER + "norms.0.*", "decoder.layers.{L}.cross_norm.*"),
    (_MM_LAYER + "norms.1.*", "decoder.layers.{L}.self_norm.*"),
    (_MM_LAYER + "norms.2.*", "decoder.layers.{L}.norm.*"),
    ("decode_head.transformer_decoder.post_norm.*", "decoder.norm.*"),
    ("decode_head.query_feat.weight", "decoder.query_features"),
    ("decode_head.query_embed.weight", "decoder.query_positions"),
    ("decode_head.level_embed.weight", "decoder.level_embed"),
    ("decode_head.cls_embed.*", "decoder.classes.*"),
    ("decode_head.mask_embed.{N}.*", "decoder.mask_embed.{N}.*"),
    ("decode_head.conv_seg.*", None),  # inherited there, and never used
)

_D3_PIXEL = "segmentation_model.1.pixel_decoder."
HEAD_DINOV3: Table = (
    (_D3_PIXEL + "input_convs.{I}.0.*", "pixel_decoder.input_projections.{I}.conv.*"),
    (_D3_PIXEL + "input_convs.{I}.1.*", "pixel_decoder.input_projections.{I}.norm.*"),
    (_D3_PIXEL + "encoder.level_encoding", "pixel_decoder.level_embed"),
    (_D3_PIXEL + "encoder.encoder.layers.{L}.self_attn.*", "pixel_decoder.layers.{L}.attention.*"),
    (_D3_PIXEL + "encoder.encoder.layers.{L}.*", "pixel_decoder.layers.{L}.*"),
    (_D3_PIXEL + "lateral_convs.0.norm.*", "pixel_decoder.lateral.norm.*"),
    (_D3_PIXEL + "lateral_convs.0.*", "pixel_decoder.lateral.conv.*"),
    (_D3_PIXEL + "output_convs.0.norm.*", "pixel_decoder.output.norm.*"),
    (_D3_PIXEL + "output_convs.0.*", "pixel_decoder.output.conv.*"),
    (_D3_PIXEL + "mask_feature.*", "pixel_decoder.mask_features.*"),
    *query_decoder_detectron2("segmentation_model.1.predictor.", "post_norm"),
)

_HUB_PIXEL = "model.pixel_level_module.decoder."
PIXEL_LEVEL_HUB: Table = (
    ("model.pixel_level_module.encoder.*", "backbone.*"),
    (_HUB_PIXEL + "input_projections.{I}.0.*", "pixel_decoder.input_projections.{I}.conv.*"),
    (_HUB_PIXEL + "input_projections.{I}.1.*", "pixel_decoder.input_projections.{I}.norm.*"),
    (_HUB_PIXEL + "level_embed", "pixel_decoder.level_embed"),
    (_HUB_PIXEL + "encoder.layers.{L}.self_attn.*", "pixel_decoder.layers.{L}.attention.*"),
    (_HUB_PIXEL + "encoder.layers.{L}.self_attn_layer_norm.*", "pixel_decoder.layers.{L}.norm1.*"),
    (_HUB_PIXEL + "encoder.layers.{L}.final_layer_norm.*", "pixel_decoder.layers.{L}.norm2.*"),
    (_HUB_PIXEL + "encoder.layers.{L}.fc{N}.*", "pixel_decoder.layers.{L}.linear{N}.*"),
    (_HUB_PIXEL + "adapter_1.0.*", "pixel_decoder.lateral.conv.*"),
    (_HUB_PIXEL + "adapter_1.1.*", "pixel_decoder.lateral.norm.*"),
    (_HUB_PIXEL + "layer_1.0.*", "pixel_decoder.output.conv.*"),
    (_HUB_PIXEL + "layer_1.1.*", "pixel_decoder.output.norm.*"),
    (_HUB_PIXEL + "mask_projection.*", "pixel_decoder.mask_features.*"),
)
"""Parts of transformers' network: the backbone and the pixel decoder."""
