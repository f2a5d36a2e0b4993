"""Put into an environment as `sitecustomize.py`: lets a CPU torch import a torchvision whose compiled ops are for CUDA."""

import sys
from importlib.abc import MetaPathFinder


class DeclareOps(MetaPathFinder):
    """Declares the ops that torchvision looks up, as soon as somebody imports it; it finds no module itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                self.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            DeclareOps.kept = self  # a library that is collected takes its ops along
        return None


sys.meta_path.insert(0, DeclareOps())
