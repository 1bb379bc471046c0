//! The device on which tests compute: the CPU, or the first NVIDIA GPU with `LLARA_TEST_DEVICE=cuda`.

/// Calls a function that is generic over the backend with the backend of the selected device.
macro_rules! on_device {
    ($check:ident) => {
        match std::env::var("LLARA_TEST_DEVICE").as_deref() {
            Err(_) | Ok("cpu") => $check(&llara::backend::Cpu::new()),
            Ok("cuda") => $check(&llara::backend::Cuda::new(0).unwrap()),
            Ok(other) => panic!("LLARA_TEST_DEVICE={other}, expected cpu or cuda"),
        }
    };
}
pub(crate) use on_device;
