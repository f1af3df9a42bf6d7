"""A custom dataset, a folder of images and masks, with mmsegmentation's default FCN: output stride 8, auxiliary head.

train.py sets the values that are None here: the folder and its classes from --data-dir and --classes, batch, learning
rate and number of iterations from the number of training images.
"""
# mypy: disable-error-code="attr-defined"

_base_ = [  # mmengine replaces the list by the merged content of the files
    "../_base_/fcn_r50-d8.py",
    "../_base_/pipelines_512x512.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(imports=["transfer.segmentation.folder_dataset"])
model = dict(decode_head=dict(num_classes=None), auxiliary_head=dict(num_classes=None))

# A mask has the pixels of its image as they are stored, so an orientation in the image's EXIF data is ignored.
load_image = dict(type="LoadImageFromFile", color_type="color_ignore_orientation")
train_dataloader = dict(
    dataset=dict(
        type="FolderDataset",
        data_root=None,
        split="train",
        metainfo=dict(classes=None),
        pipeline=[load_image, *_base_.train_pipeline[1:]],
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="FolderDataset",
        data_root=None,
        split="val",
        metainfo=dict(classes=None),
        pipeline=[load_image, *_base_.test_pipeline[1:]],
    ),
)
test_dataloader = val_dataloader

auto_scale_lr = dict(base_batch_size=None)  # 16, or the number of images if it is smaller
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=None, momentum=0.9, weight_decay=0.0005),  # 0.01 for a batch of 16
    clip_grad=None,
)
param_scheduler = [dict(type="PolyLR", eta_min=None, power=0.9, begin=0, end=None, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=None, val_interval=None)  # ADE20K's x sqrt(images / 20,210)
default_hooks = dict(checkpoint=dict(interval=None), logger=dict(interval=None))
