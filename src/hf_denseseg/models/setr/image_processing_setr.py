# Copyright 2026 The hf_denseseg authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Image processors of SETR: the shared ones under the names that the Auto classes resolve."""

from hf_denseseg.models.image_processing import (
    SegmentationImageProcessor,
    SegmentationImageProcessorKwargs,
    SegmentationImageProcessorPil,
)


class SetrImageProcessorKwargs(SegmentationImageProcessorKwargs, total=False):
    """Options of both backends."""


class SetrImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of SETR, see `SegmentationImageProcessor`."""

    valid_kwargs = SetrImageProcessorKwargs


class SetrImageProcessorPil(SegmentationImageProcessorPil):
    """The same with PIL and numpy (SETR)."""

    valid_kwargs = SetrImageProcessorKwargs


__all__ = ["SetrImageProcessor", "SetrImageProcessorKwargs", "SetrImageProcessorPil"]
