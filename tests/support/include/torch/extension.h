// What DeepSpeed's operators use of PyTorch's header of this name, which takes three fifths longer to read.
#pragma once
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>
