"""A custom dataset, a folder of images and masks.

train.py sets the values that are None here and in the configs: the folder and its classes from --data-dir and
--classes, batch, learning rate and number of iterations from the number of training images.
"""
# mypy: disable-error-code="attr-defined"

_base_ = ["./pipelines_512x512.py", "./default_runtime.py"]  # mmengine replaces the list by the merged content

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
train_cfg = dict(type="IterBasedTrainLoop", max_iters=None, val_interval=None)
default_hooks = dict(checkpoint=dict(interval=None), logger=dict(interval=None))
