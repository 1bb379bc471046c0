"""Defects of the host code in crates/llara/src/backend/cuda: name, edits, and the reason if no test can detect it.

An edit is (file, text, replacement); `@` in a replacement stands for the condition under which the defect is active.
"""

TRANSFER, DRIVER, MEMORY, BLAS = "transfer.rs", "driver.rs", "memory.rs", "blas.rs"
PRODUCTS, DEVICE, NORMS, ROWS = "products.rs", "device.rs", "norms.rs", "rows.rs"
POINTWISE, OBJECTIVE, ATTENTION = "pointwise.rs", "objective.rs", "attention.rs"


def chosen(file, right, wrong):
    """An edit that replaces an expression."""
    return file, right, f"(if @ {{ {wrong} }} else {{ {right} }})"


def skipped(file, statement):
    """An edit that leaves a statement out."""
    return file, statement, f"if !@ {{ {statement} }}"


MUTANTS = [
    ("transfer: a result is read before its copy", [skipped(TRANSFER, "download.event.wait()?;")]),
    ("transfer: a pinned buffer is used again while it is read", [
        (TRANSFER, "if !event.is_reached()? {", "if !@ && !event.is_reached()? {")]),
    ("transfer: a pinned buffer is returned without an event", [
        (TRANSFER, "staging.lend(pinned)?;", "if @ { staging.put(pinned) } else { staging.lend(pinned)? }")]),
    ("transfer: no event after an upload", [skipped(TRANSFER, "self.context.record(&event)?;")]),
    ("transfer: no event after a download", [skipped(TRANSFER, "    context.record(&event)?;")]),
    ("transfer: a dropped download is not waited for", [skipped(TRANSFER, "let _ = self.event.wait();")]),
    ("transfer: pinned buffers are freed while they are read", [skipped(TRANSFER, "let _ = self.context.synchronize();")]),
    ("transfer: a pinned buffer is filled after its copy was enqueued", [
        (TRANSFER, "let mut pinned = staging.take(bytes)?;\n        for",
         "let mut pinned = staging.take(bytes)?;\n        if @ { copy_to_device(context, buffer.pointer(), &pinned.as_slice()[..bytes])?; }\n        for"),
        (TRANSFER, "        copy_to_device(context, buffer.pointer(), &pinned.as_slice()[..bytes])?;",
         "        if !@ { copy_to_device(context, buffer.pointer(), &pinned.as_slice()[..bytes])?; }")]),
    ("transfer: rows of a block at the wrong distance", [chosen(TRANSFER, "(to.stride * to.dtype.bytes())", "(to.cols * to.dtype.bytes())")]),
    ("transfer: offsets of lists in elements", [(TRANSFER, "*offset = 4 * end;", "*offset = if @ { end } else { 4 * end };")]),
    ("transfer: half of a result is copied", [
        (TRANSFER, "x.pointer, bytes, context.stream())", "x.pointer, if @ { bytes / 2 } else { bytes }, context.stream())")]),
    ("driver: kernels on the default stream", [
        (DRIVER, "                self.stream,\n                parameters", "                if @ { std::ptr::null_mut() } else { self.stream },\n                parameters")]),
    ("driver: synchronize does not wait", [
        (DRIVER, "check(unsafe { cu::cuStreamSynchronize(self.stream) }", "if @ { return Ok(()); }\n        check(unsafe { cu::cuStreamSynchronize(self.stream) }")]),
    ("driver: the limit of shared memory is not raised", [(DRIVER, "if shared_bytes > 48 << 10 {", "if !@ && shared_bytes > 48 << 10 {")]),
    ("driver: an event on the default stream", [chosen(DRIVER, "cu::cuEventRecord(event.event, self.stream)", "cu::cuEventRecord(event.event, std::ptr::null_mut())")]),
    ("driver: an event that is not reached counts as reached", [(DRIVER, "CUDA_ERROR_NOT_READY => Ok(false)", "CUDA_ERROR_NOT_READY => Ok(@)")]),
    ("memory: half of the bytes are taken", [
        (MEMORY, "let units = bytes.div_ceil(UNIT);", "let units = if @ { bytes.div_ceil(2 * UNIT) } else { bytes.div_ceil(UNIT) };")]),
    ("memory: not mapped up to its end", [(MEMORY, "if end > self.mapped\n", "if !@ && end > self.mapped\n")]),
    ("memory: unmapped while work waits", [skipped(MEMORY, "let _ = self.context.synchronize();")],
     "the staging buffers are dropped before the memory, and their drop has waited for all work"),
    ("memory: freed on the default stream", [
        (MEMORY, "cu::cuMemFreeAsync(pointer, self.context.stream())",
         "cu::cuMemFreeAsync(pointer, if @ { std::ptr::null_mut() } else { self.context.stream() })")]),
    ("memory: an offset in units instead of bytes", [chosen(MEMORY, "(offset * UNIT)", "offset * UNIT / 4")]),
    ("blas: wrong leading dimension", [chosen(BLAS, "x.stride as i64", "x.cols as i64")]),
    ("blas: wrong operand transposed", [
        (BLAS, "transpose(product.right_transposed)", "transpose(if @ { product.left_transposed } else { product.right_transposed })"),
        (BLAS, "transpose(product.left_transposed)", "transpose(if @ { product.right_transposed } else { product.left_transposed })")]),
    ("blas: operands swapped", [
        (BLAS, "address(product.right),", "address(if @ { product.left } else { product.right }),"),
        (BLAS, "address(product.left),", "address(if @ { product.right } else { product.left }),")]),
    ("blas: a workspace that is smaller than the preference", [
        (BLAS, "memory.allocate(WORKSPACE_BYTES)?", "memory.allocate(if @ { WORKSPACE_BYTES / 2 } else { WORKSPACE_BYTES })?")]),
    ("blas: the workspace is memory of a matrix", [
        (BLAS, "self.workspace.pointer() as *mut c_void", "(if @ { product.left.pointer & !255 } else { self.workspace.pointer() }) as *mut c_void")]),
    ("blas: alignment assumed", [
        (BLAS, "(1 << x.pointer.trailing_zeros().min(8)).min(ALIGNMENT as u32)", "if @ { 256 } else { (1 << x.pointer.trailing_zeros().min(8)).min(ALIGNMENT as u32) }")]),
    ("blas: an addend that is not there", [
        (BLAS, "if product.onto.is_some() { 1.0f32 } else { 0.0 }", "if @ || product.onto.is_some() { 1.0f32 } else { 0.0 }")]),
    ("blas: alpha ignored", [(BLAS, "let alpha = product.alpha;", "let alpha = if @ { 1.0 } else { product.alpha };")]),
    ("blas: an algorithm for other leading dimensions", [
        (BLAS, "strides: [left.stride, right.stride, onto.stride, out.stride]", "strides: if @ { [0; 4] } else { [left.stride, right.stride, onto.stride, out.stride] }")]),
    ("blas: an algorithm for other dtypes", [
        (BLAS, "dtypes: [left.dtype, out.dtype]", "dtypes: if @ { [left.dtype; 2] } else { [left.dtype, out.dtype] }")]),
    ("blas: on the default stream", [
        (BLAS, "context.stream().cast(),", "if @ { std::ptr::null_mut() } else { context.stream().cast() },")]),
    ("products: a converted operand is freed before its use", [
        (PRODUCTS, "Ok(Operand { block: Block::from(&copy), _copy: Some(copy) })",
         "{ let block = Block::from(&copy); Ok(Operand { block, _copy: (!@).then_some(copy) }) }")]),
    ("products: the residual is missing", [
        (PRODUCTS, "residual: residual.map_or(0, CudaTensor::pointer)", "residual: if @ { 0 } else { residual.map_or(0, CudaTensor::pointer) }")]),
    ("products: wide accesses without alignment", [(PRODUCTS, "wide: u32::from(wide)", "wide: u32::from(@ || wide)")]),
    ("products: wrong strides in the plain kernel", [chosen(PRODUCTS, "strides(right, product.right_transposed)", "strides(right, product.left_transposed)")]),
    ("products: the last rows of the plain kernel", [chosen(PRODUCTS, "out.rows.div_ceil(16)", "out.rows / 16")]),
    ("products: a stale working copy of a weight", [
        (OBJECTIVE, "weight.working.as_ref().map_or(0, address)", "if @ { 0 } else { weight.working.as_ref().map_or(0, address) }")]),
    ("launch: the last block is missing", [chosen(DEVICE, "items.div_ceil(BLOCK as usize)", "items / BLOCK as usize")]),
    ("launch: half of the shared memory", [(DEVICE, "block, shared_bytes as u32, &args", "block, shared_bytes as u32 >> u32::from(@), &args")]),
    ("norms: the last groups are missing", [chosen(NORMS, "self.count.div_ceil(block / 16)", "self.count / (block / 16)")]),
    ("norms: stride of the argument for the result", [(NORMS, "y_stride: x.cols as u64", "y_stride: if @ { x.stride } else { x.cols } as u64")]),
    ("norms: wide accesses to heads that are not aligned", [
        (NORMS, "let whole = self.heads == 1", "let whole = @ || self.heads == 1")],
     "open: no test has several heads whose size is not a multiple of eight; no model has them"),
    ("norms: one head per row in the gradient", [
        (NORMS, "            dx: dx.pointer,\n            groups: groups.count as u64,\n            heads: groups.heads as u64,",
         "            dx: dx.pointer,\n            groups: groups.count as u64,\n            heads: if @ { 1 } else { groups.heads as u64 },")]),
    ("rows: rows outside of all segments are not zeroed", [
        (ROWS, "let dx = self.zeros(rows, dy.cols(), dy.dtype())?;",
         "let dx = if @ { self.unspecified(rows, dy.cols(), dy.dtype()) } else { self.zeros(rows, dy.cols(), dy.dtype()) }?;")],
     "open: every row of the tests and of the models belongs to a segment"),
    ("rows: half of a matrix is zeroed", [
        (ROWS, "x.pointer(), 0, x.bytes(),", "x.pointer(), 0, x.bytes() >> u32::from(@),")]),
    ("rows: zeros on the default stream", [
        (ROWS, " self.context.stream()) };\n        check(result, \"fill", " if @ { std::ptr::null_mut() } else { self.context.stream() }) };\n        check(result, \"fill")]),
    ("rows: the last columns of a row are missing", [chosen(ROWS, "octets.div_ceil(block.max(1) as usize)", "1")],
     "open: no test of rows has more than 1,024 columns; norms and products do"),
    ("rows: stride of a block in sums of columns", [
        (ROWS, "stride: dy.stride as u64,", "stride: if @ { dy.cols } else { dy.stride } as u64,")]),
    ("rows: a bias gradient is added to what was there", [chosen(ROWS, "accumulate == Accumulate::Add", "true")]),
    ("pointwise: half of the columns have dropout", [chosen(POINTWISE, "rows * 2 * cols.div_ceil(DROPOUT_BLOCK)", "rows * cols.div_ceil(DROPOUT_BLOCK)")]),
    ("pointwise: the seed has 32 bits", [(POINTWISE, "(key.seed >> 32) as u32", "(key.seed >> if @ { 40 } else { 32 }) as u32")]),
    ("pointwise: stride of a block in rope", [
        (POINTWISE, "stride: x.stride as u64,", "stride: if @ { x.cols } else { x.stride } as u64,")]),
    ("objective: losses in too little memory", [
        (OBJECTIVE, "each.\n        let losses = self.unspecified(rows, 2, Dtype::F32)?;",
         "each.\n        let losses = self.unspecified(rows, if @ { 1 } else { 2 }, Dtype::F32)?;")]),
    ("objective: tasks of another size than in the kernel", [chosen(OBJECTIVE, "range.len().div_ceil(SQUARES_TASK)", "range.len().div_ceil(2 * SQUARES_TASK)")]),
    ("objective: an update without alignment", [
        (OBJECTIVE, "pointers.iter().all(|pointer| pointer.is_multiple_of(16))", "@ || pointers.iter().all(|pointer| pointer.is_multiple_of(16))")]),
    ("objective: an update of the first elements", [
        (OBJECTIVE, "elements(x, range.clone()).pointer;", "if @ { x.pointer() } else { elements(x, range.clone()).pointer };")]),
    ("attention: too little shared memory", [(ATTENTION, "THREADS, 512 * hd, args", "THREADS, 512 * hd >> u32::from(@), args")]),
    ("attention: tiles of whole sequences only", [
        (ATTENTION, "let grid = [q.rows / QUERIES + args.sequences as usize, heads, 1];",
         "let grid = [if @ { q.rows.div_ceil(QUERIES) } else { q.rows / QUERIES + args.sequences as usize }, heads, 1];")]),
    ("attention: delta is not computed", [
        (ATTENTION, "self.launch(&format!(\"attention_delta_{}\", dq.dtype), query_grid, THREADS, args)?;",
         "if !@ { self.launch(&format!(\"attention_delta_{}\", dq.dtype), query_grid, THREADS, args)?; }")]),
    ("attention: stride of the queries for keys", [(ATTENTION, "k_stride: small(k.stride)", "k_stride: small(if @ { q.stride + 8 } else { k.stride })")]),
    ("attention: a window that is one larger", [
        (ATTENTION, "window.min(1 << 31) as u32)", "window.min(1 << 31) as u32 + u32::from(@))")]),
    ("attention: wide accesses to strides that are not aligned", [
        (ATTENTION, "x.stride.is_multiple_of(8))", "(@ || x.stride.is_multiple_of(8)))")]),
]
