"""Parts that look at photographs with a model of transformers: detector, segmenter, depth.

Each is loaded from a folder, or from the hub by its id, which downloads it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch.nn.functional import interpolate

from step1x_edit.datagen.backgrounds import Picture
from step1x_edit.datagen.photographs.roles import Box, Found, Mask
from step1x_edit.errors import CheckpointError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class OpenVocabularyDetector:
    """Finds what a list of names says (OWLv2, Minderer et al. 2023).

    Args:
        model: Folder or hub id.
        names: English → Chinese name of what to look for.
        threshold: Least confidence, 0 to 1.
        device: Where it runs, as torch names it.
    """

    def __init__(
        self, model: str, names: Mapping[str, str], threshold: float = 0.3, device: str = "cpu"
    ) -> None:
        from transformers import AutoTokenizer, Owlv2ForObjectDetection, Owlv2Processor
        from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

        self.name, self.names, self.threshold = short_name(model), dict(names), threshold
        self._model = loaded(Owlv2ForObjectDetection, model).to(device)
        self._processor: Any = Owlv2Processor(
            loaded(Owlv2ImageProcessorPil, model), loaded(AutoTokenizer, model)
        )

    @torch.inference_mode()
    def find(self, picture: Picture) -> list[Found]:
        """See `roles.Detector`."""
        asked = [f"a photo of a {name}" for name in self.names]
        inputs = self._processor(text=[asked], images=Image.fromarray(picture), return_tensors="pt")
        outputs = self._model(**inputs.to(self._model.device))
        height, width = picture.shape[:2]
        (found,) = self._processor.post_process_grounded_object_detection(
            outputs, self.threshold, target_sizes=[(height, width)]
        )
        english = list(self.names)
        things = []
        for score, label, corners in zip(
            found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True
        ):
            box = _inside(corners, height, width)
            if box is not None:
                en = english[label]
                things.append(Found(box, score, en, self.names[en]))
        return sorted(things, key=lambda thing: -thing.score)


class SamSegmenter:
    """Cuts out what a box holds (SAM 2, Ravi et al. 2024).

    Args:
        model: Folder or hub id.
        device: Where it runs, as torch names it.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import Sam2Model

        self.name = short_name(model)
        self._model: Any = loaded(Sam2Model, model).to(device)

    @torch.inference_mode()
    def cut(self, picture: Picture, box: Box) -> Mask:
        """See `roles.Segmenter`."""
        # transformers' own processor needs torchvision; the model takes a square, normalised.
        side = self._model.config.vision_config.backbone_config.image_size[0]
        square = Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR)
        values = (np.asarray(square, np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        height, width = picture.shape[:2]
        top, left, bottom, right = box
        corners = [left / width, top / height, right / width, bottom / height]
        outputs = self._model(
            pixel_values=_batch(values).to(self._model.device),
            input_boxes=torch.tensor([[corners]], device=self._model.device) * side,
            multimask_output=False,
        )
        logits = outputs.pred_masks[0].float()  # (1 box, 1 mask, H, W)
        logits = interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        return (logits[0, 0] > 0).cpu().numpy()


class DepthModel:
    """Relative depth from one picture (Depth Anything, Yang et al. 2024; DPT).

    Args:
        model: Folder or hub id.
        device: Where it runs, as torch names it.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoModelForDepthEstimation
        from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

        self.name = short_name(model)
        self._model: Any = loaded(AutoModelForDepthEstimation, model).to(device)
        self._processor: Any = loaded(DPTImageProcessorPil, model)

    @torch.inference_mode()
    def depth(self, picture: Picture) -> Float[np.ndarray, "height width"]:
        """See `roles.DepthEstimator`."""
        inputs = self._processor(Image.fromarray(picture), return_tensors="pt")
        nearness = self._model(**inputs.to(self._model.device)).predicted_depth[:, None].float()
        nearness = interpolate(nearness, picture.shape[:2], mode="bicubic", align_corners=False)
        low, high = nearness.min(), nearness.max()
        return (
            ((nearness - low) / (high - low).clamp(min=torch.finfo(low.dtype).tiny))[0, 0]
            .cpu()
            .numpy()
        )


def loaded(kind: Any, model: str, **options: Any) -> Any:
    """``kind.from_pretrained(model)``, ready to be run.

    Raises:
        CheckpointError: There is no such model, or it is not of that kind; one line.
    """
    try:
        made = kind.from_pretrained(model, **options)
    except Exception as error:  # missing files, wrong keys, no network: each library has its own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{model} cannot be loaded as {kind.__name__} ({reason}): give its folder or hub id"
        ) from error
    return made.eval() if isinstance(made, torch.nn.Module) else made


def short_name(model: str) -> str:
    """What a record calls a model: the last part of its path or hub id."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def _batch(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).movedim(-1, 0)[None]


def _inside(corners: list[float], height: int, width: int) -> Box | None:
    """A box of whole pixels inside the picture from (left, top, right, bottom); None if empty."""
    left, top, right, bottom = corners
    box = (
        max(int(top), 0),
        max(int(left), 0),
        min(round(bottom), height),
        min(round(right), width),
    )
    return box if box[2] - box[0] > 1 and box[3] - box[1] > 1 else None
