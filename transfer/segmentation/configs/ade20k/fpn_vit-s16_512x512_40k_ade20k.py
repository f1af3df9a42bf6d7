"""ADE20K with Semantic FPN on a ViT-S/16: 40k iterations, batch size 16, AdamW with learning rate 6e-5.

Published with these settings: 30.6 mIoU for GTSA (arXiv 2304.08014) after 100 epochs on COCO, and 27.3 for DINO. The
rest of the recipe is not published; weight decay, warm-up, linear decay and drop path are those of mmsegmentation's
configs for ViTs, except that biases have no weight decay, which is this project's choice.
"""
# mypy: disable-error-code="attr-defined"

_base_ = [  # mmengine replaces the list by the merged content of the files
    "../_base_/fpn_vit-s16.py",
    "../_base_/ade20k.py",
    "../_base_/pipelines_512x512.py",
]
custom_imports = dict(imports=["transfer.segmentation.mm_vit"])
model = dict(decode_head=dict(num_classes=150))

train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=40000, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=4000)
