"""Three rooms with the same door.

``reference`` (torch, slow, obvious), ``native`` (C++, CPU) and ``triton`` (GPU, or the CPU in
Triton's interpreter) each offer, with one signature and the same bits:

    combine_(dst, src, scales, *, seed, directions, streams, offsets, src_scale, stochastic,
             distribution, changes)
    pair_(plus, minus, src, scales, *, seed, direction, streams, offsets, distribution)
    advance_(tensors, residuals, scales, *, seed, directions, lengths, src_scales, streams,
             offsets, stochastic, distribution, changes)
    swap_(tensors of one dtype, store, held_scales, scales, *, keep, seed, direction, streams,
          offsets, src_scale, stochastic, distribution, changes) -> store
    normal(count, *, seed, direction, stream, offset, device)
    rademacher(count, *, seed, direction, stream, offset, device)
    random_words(count, *, seed, direction, stream, offset, device)
    fake_quant(out, tensor, scheme, *, group, symmetric, scales)
    group_ends(tensor, *, group) -> ends
    perturb_quant(out, src, scale, scheme, *, group, symmetric, scales_of, look, seed, direction,
                  stream, offset, distribution)
    DEVICE_SCALES: whether combine_ takes scales and directions as tensors on the device too
    FAKE_QUANT_FINDS_ENDS: whether fake_quant returns the ends of the tensor (native's does)

Arguments are checked in zo_kernels/ops and zo_kernels/quantize.py, not here.
"""
