"""PASCAL VOC 2012 with SBD's annotations: 10,582 training and 1,449 validation images, 21 classes.

Configs add the pipelines.
"""

_base_ = "./default_runtime.py"
train_dataloader = dict(
    dataset=dict(
        type="ConcatDataset",
        datasets=[
            dict(
                type="PascalVOCDataset",
                data_root="data/VOCdevkit/VOC2012",
                data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
                ann_file="ImageSets/Segmentation/train.txt",
            ),
            dict(
                type="PascalVOCDataset",
                data_root="data/VOCdevkit/VOC2012",
                data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassAug"),
                ann_file="ImageSets/Segmentation/aug.txt",
            ),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        type="PascalVOCDataset",
        data_root="data/VOCdevkit/VOC2012",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        ann_file="ImageSets/Segmentation/val.txt",
    ),
)
test_dataloader = val_dataloader
