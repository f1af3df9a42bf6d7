"""Cityscapes with fine annotations: 2,975 training and 500 validation images, 19 classes; configs add pipelines."""

_base_ = "./default_runtime.py"
train_dataloader = dict(
    dataset=dict(
        type="CityscapesDataset",
        data_root="data/cityscapes",
        data_prefix=dict(img_path="leftImg8bit/train", seg_map_path="gtFine/train"),
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="CityscapesDataset",
        data_root="data/cityscapes",
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
    ),
)
test_dataloader = val_dataloader
