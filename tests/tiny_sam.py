"""Networks of SAM's three generations with a few random weights, as transformers builds them from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

GENERATIONS = ("sam", "sam2", "sam3_tracker")


def tiny_sam(transformers: Any, name: str) -> torch.nn.Module:
    """A model that works on images of 64 x 64."""
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    if name == "sam":
        vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 64, "patch_size": 16, "mlp_dim": 32, "window_size": 2, "num_pos_feats": 16}
        vision |= {"global_attn_indexes": [0]}
        prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
        config = transformers.SamConfig(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
        )
        return transformers.SamModel(config)
    if name == "sam2":
        body = {
            "hidden_size": 16,
            "image_size": [64, 64],
            "blocks_per_stage": [1, 1, 1, 1],
            "global_attention_blocks": [],
        }
        body |= {"embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 1, 1, 1]}
        body |= {"window_size_per_stage": [4, 2, 2, 2], "window_positional_embedding_background_size": [4, 4]}
        vision = {"backbone_config": body | {"model_type": "sam2_hiera_det_model"}, "fpn_hidden_size": 32}
        vision |= {"backbone_channel_list": [128, 64, 32, 16]}
        vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
        prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
        config = transformers.Sam2Config(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
        )
        return transformers.Sam2Model(config)
    body = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    body |= {
        "image_size": 56,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [0],
        "pretrain_image_size": 56,
    }
    vision = {"backbone_config": body | {"model_type": "sam3_vit_model"}, "fpn_hidden_size": 32}
    vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    prompts = {"hidden_size": 32, "image_size": 56, "patch_size": 14, "mask_input_channels": 4}
    config = transformers.Sam3TrackerConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    return transformers.Sam3TrackerModel(config)


def save_tiny_sam(transformers: Any, name: str, folder: Path) -> Path:
    """Weights of seed 0 in a folder, where masks are neither empty nor full."""
    torch.manual_seed(0)
    tiny_sam(transformers, name).save_pretrained(folder)
    return folder
