"""Triton's LLVM IR for NVIDIA GPUs, translated for this CPU and run; run_llir.py is the way in."""
