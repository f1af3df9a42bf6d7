"""A custom dataset, a folder of images and masks, with Semantic FPN on a ViT-S/16.

train.py sets the values that are None here and in _base_/folder.py.
"""

_base_ = ["../_base_/fpn_vit-s16.py", "../_base_/folder.py"]
custom_imports = dict(imports=["transfer.segmentation.folder_dataset", "transfer.segmentation.mm_vit"])
model = dict(decode_head=dict(num_classes=None))

ade20k_schedule = dict(lr=6e-5, max_iters=40000)  # which train.py scales to the batch and the number of images
optim_wrapper = dict(optimizer=dict(lr=None))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=None, by_epoch=False),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=None, end=None, by_epoch=False),
]
