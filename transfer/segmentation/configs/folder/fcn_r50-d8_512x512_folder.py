"""A custom dataset, a folder of images and masks, with mmsegmentation's default FCN: output stride 8, auxiliary head.

train.py sets the values that are None here and in _base_/folder.py.
"""

_base_ = ["../_base_/fcn_r50-d8.py", "../_base_/folder.py"]
custom_imports = dict(imports=["transfer.segmentation.folder_dataset"])
model = dict(decode_head=dict(num_classes=None), auxiliary_head=dict(num_classes=None))

ade20k_schedule = dict(lr=0.01, max_iters=80000)  # which train.py scales to the batch and the number of images
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=None, momentum=0.9, weight_decay=0.0005), clip_grad=None
)
param_scheduler = [dict(type="PolyLR", eta_min=None, power=0.9, begin=0, end=None, by_epoch=False)]
