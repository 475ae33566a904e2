//! Standard output.

use std::io::{self, StdoutLock, Write};

/// Standard output, where a reader that has gone away, such as `head`, is no error. Other errors say that it is standard
/// output that cannot be written.
#[derive(Debug)]
pub struct Output(StdoutLock<'static>);

/// Locks standard output.
pub fn output() -> Output {
    Output(io::stdout().lock())
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        unless_gone(self.0.write(bytes), bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        unless_gone(self.0.flush(), ())
    }
}

fn unless_gone<R>(result: io::Result<R>, otherwise: R) -> io::Result<R> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(otherwise),
        Err(error) => Err(io::Error::new(error.kind(), format!("cannot write to standard output: {error}"))),
        Ok(done) => Ok(done),
    }
}
