"""Whom to cite for a model: its network, its data and its long-tailed protocol, as BibTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nc_hf.data.provenance import LONG_TAIL_CITATION, PROVENANCE

TIMM = """@misc{rw2019timm,
  title = {{PyTorch} Image Models},
  author = {Wightman, Ross},
  howpublished = {https://github.com/huggingface/pytorch-image-models},
  doi = {10.5281/zenodo.4414861},
  year = {2019}
}"""
RESNET = """@inproceedings{he2016deep,
  title = {Deep Residual Learning for Image Recognition},
  author = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2016}
}"""
RESNEXT = """@inproceedings{xie2017aggregated,
  title = {Aggregated Residual Transformations for Deep Neural Networks},
  author = {Xie, Saining and Girshick, Ross and Doll{\\'a}r, Piotr and Tu, Zhuowen and He, Kaiming},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2017}
}"""
RIDE = """@inproceedings{wang2021longtailed,
  title = {Long-tailed Recognition by Routing Diverse Distribution-Aware Experts},
  author = {Wang, Xudong and Lian, Long and Miao, Zhongqi and Liu, Ziwei and Yu, Stella X.},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}"""
BBN = """@inproceedings{zhou2020bbn,
  title = {{BBN}: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual Recognition},
  author = {Zhou, Boyan and Cui, Quan and Wei, Xiu-Shen and Chen, Zhao-Min},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2020}
}"""
# Patterns of the names of architectures; timm's own are those that do not end as ours.
NETWORKS = {r"resnet\d.*": RESNET, r"resnext.*": RESNEXT, r".*_ride(_cifar)?": RIDE, r".*_bbn_cifar": BBN}
OURS = r".*(_cifar|_ride)"


def citations(config: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """BibTeX of the network, the data set and the long-tailed protocol, as far as they are known.

    Args:
        config: content of the model's `config.json`.
        results: content of its `results.json`.
    """
    architecture, dataset = config.get("architecture") or "", results["dataset"]
    known = PROVENANCE.get(dataset.get("name"))
    return [
        *(citation for pattern, citation in NETWORKS.items() if re.fullmatch(pattern, architecture)),
        *([TIMM] if architecture and not re.fullmatch(OURS, architecture) else []),
        *([known.citation] if known else []),
        *([LONG_TAIL_CITATION] if dataset.get("imbalance_ratio") else []),
    ]
