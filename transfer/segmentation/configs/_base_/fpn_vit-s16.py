"""Semantic FPN (arXiv 1901.02446) on a ViT-S/16: maps of four blocks, rescaled to the strides 4, 8, 16 and 32.

Each config sets the number of classes and the schedule, and imports `transfer.segmentation.mm_vit`. Other ViTs need
other values of `embed_dims`, `num_layers`, `num_heads`, `out_indices` and `patch_size`, the width in the neck, and a
`size_divisor` of two patches.
"""

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
        # An image of any size is padded at the right and at the bottom to multiples of two patches, because the pyramid
        # pools two patches per side into one; the predictions for the padding are cut off.
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(
        type="DINOVisionTransformer",
        img_size=224,  # of pre-training, from which the position embeddings are resized
        patch_size=16,
        embed_dims=384,
        num_layers=12,
        num_heads=6,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        patch_bias=True,  # mmsegmentation's default drops the bias of the patch embedding
        final_norm=True,  # of the last map
        norm_cfg=dict(type="LN", eps=1e-6),
    ),
    neck=[
        dict(type="Feature2Pyramid", embed_dim=384, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
        dict(type="FPN", in_channels=[384, 384, 384, 384], out_channels=256, num_outs=4),
    ],
    decode_head=dict(
        type="FPNHead",
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=None,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

# No weight decay on norms, biases, position embeddings and class token. mmsegmentation names the norms of its ViT
# `ln1` and `ln2`, and the bias of query, key and value `in_proj_bias`. mmsegmentation's configs for ViTs do decay
# biases.
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    clip_grad=None,
    paramwise_cfg=dict(
        norm_decay_mult=0.0,  # of neck and head
        custom_keys={".ln": no_decay, "bias": no_decay, "pos_embed": no_decay, "cls_token": no_decay},
    ),
)
