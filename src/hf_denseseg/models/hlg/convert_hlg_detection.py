"""Key names of official detection checkpoints (mmdetection's RetinaNet and Mask R-CNN over HLG) -> ours.

Our predictors have the official order of classes with background last, so no row is permuted or added.
"""

from typing import Any

Renames = tuple[tuple[str, Any], ...]

PYRAMID: Renames = (
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"feature_pyramid.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"feature_pyramid.layer_blocks.\1.0."),
)
RETINANET: Renames = (
    (r"^neck\.fpn_convs\.3\.conv\.", "feature_pyramid.extra_blocks.p6."),
    (r"^neck\.fpn_convs\.4\.conv\.", "feature_pyramid.extra_blocks.p7."),
    *PYRAMID,
    (r"^bbox_head\.cls_convs\.(\d)\.conv\.", r"detection_head.classification_head.conv.\1.0."),
    (r"^bbox_head\.reg_convs\.(\d)\.conv\.", r"detection_head.regression_head.conv.\1.0."),
    (r"^bbox_head\.retina_cls\.", "detection_head.classification_head.cls_logits."),
    (r"^bbox_head\.retina_reg\.", "detection_head.regression_head.bbox_reg."),
)
MASK_RCNN: Renames = (
    *PYRAMID,
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.([01])\.", lambda found: f"roi_heads.box_head.fc{int(found[1]) + 6}."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
)
DETECTION_RENAMES = {"HlgForObjectDetection": RETINANET, "HlgForInstanceSegmentation": MASK_RCNN}
"""Task class -> renames of all keys outside the backbone, applied before those of the backbone."""

LABEL_ROWS = {
    "HlgForObjectDetection": ("bbox_head.retina_cls.bias", 9),
    "HlgForInstanceSegmentation": ("roi_head.mask_head.conv_logits.bias", 1),
}
"""Task class -> (official key, rows per class), from which the number of classes of a checkpoint is read."""

__all__ = ["DETECTION_RENAMES", "LABEL_ROWS"]
