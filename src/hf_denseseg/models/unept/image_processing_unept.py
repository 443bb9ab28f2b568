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

"""Image processors of UN-EPT: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.models.image_processing import (
    SegmentationImageProcessor,
    SegmentationImageProcessorKwargs,
    SegmentationImageProcessorPil,
)


class UneptImageProcessorKwargs(SegmentationImageProcessorKwargs, total=False):
    """Options of both backends."""


class UneptImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of UN-EPT, see `SegmentationImageProcessor`."""

    valid_kwargs = UneptImageProcessorKwargs


class UneptImageProcessorPil(SegmentationImageProcessorPil):
    """The same with PIL and numpy (UN-EPT)."""

    valid_kwargs = UneptImageProcessorKwargs


__all__ = ["UneptImageProcessor", "UneptImageProcessorKwargs", "UneptImageProcessorPil"]
