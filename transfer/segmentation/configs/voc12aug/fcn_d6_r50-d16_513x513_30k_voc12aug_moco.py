"""PASCAL VOC with MoCo's FCN: 30k iterations, batch size 16, learning rate 0.003, divided by 10 after 70% and 90%."""

_base_ = ["../_base_/fcn_d6_r50-d16.py", "../_base_/voc12aug_513x513.py", "../_base_/default_runtime.py"]
model = dict(decode_head=dict(num_classes=21))

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.003, momentum=0.9, weight_decay=0.0001), clip_grad=None
)
param_scheduler = [dict(type="MultiStepLR", milestones=[21000, 27000], gamma=0.1, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=30000, val_interval=5000)
