//! A thread that does one order after the other, each while its giver does something else.

use crate::executor::ExecutorError;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What a thread answers an order with.
pub(super) type OrderResult<R> = Result<R, ExecutorError>;

/// A running thread. When it is dropped it is waited for.
pub(super) struct OrderThread<O, R> {
    name: &'static str,
    orders: Option<Sender<O>>,
    results: Receiver<OrderResult<R>>,
    thread: Option<JoinHandle<()>>,
}

impl<O: Send + 'static, R: Send + 'static> OrderThread<O, R> {
    /// Starts a thread whose body answers each order, until there are none. Up to `most` may be
    /// under way.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        (name, most): (&'static str, usize),
        body: impl FnOnce(&Receiver<O>, &Sender<OrderResult<R>>) + Send + 'static,
    ) -> Result<Self, ExecutorError> {
        let (orders, ordered) = bounded(most);
        let (done, results) = bounded(most);
        let thread = thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || body(&ordered, &done)).map_err(ExecutorError::Threads)?;
        Ok(Self { name, orders: Some(orders), results, thread: Some(thread) })
    }

    /// Gives an order. Each is to be finished, in their order.
    ///
    /// # Errors
    /// The thread has gone.
    pub fn begin(&self, order: O) -> Result<(), ExecutorError> {
        let orders = self.orders.as_ref().expect("orders until the thread is dropped");
        orders.send(order).map_err(|_| self.gone())
    }

    /// Waits for the end of an order.
    ///
    /// # Errors
    /// What it failed with, or the thread has gone.
    pub fn finish(&self) -> OrderResult<R> {
        self.results.recv().map_err(|_| self.gone())?
    }

    /// The same for no longer than `most`; none when that is over.
    pub fn finish_within(&self, most: Duration) -> Option<OrderResult<R>> {
        match self.results.recv_timeout(most) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(self.gone())),
        }
    }

    fn gone(&self) -> ExecutorError {
        ExecutorError::GpuStageFailed { reason: format!("the thread {} has ended", self.name) }
    }
}

impl<O, R> Drop for OrderThread<O, R> {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was told as the failure of its order.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_answered_until_the_thread_fails() {
        let thread = OrderThread::start(("tandem-test", 1), |orders, results| {
            for order in orders {
                assert!(order < 3, "told as the failure of its order");
                results.send(Ok(2 * order)).unwrap();
            }
        });
        let thread = thread.unwrap();
        assert!(thread.finish_within(Duration::ZERO).is_none());
        for order in [1, 2] {
            thread.begin(order).unwrap();
            assert_eq!(thread.finish().unwrap(), 2 * order);
        }
        thread.begin(3).unwrap();
        let error = thread.finish().unwrap_err().to_string();
        assert!(error.contains("tandem-test"), "{error}");
        assert!(thread.finish_within(Duration::from_secs(9)).unwrap().is_err());
        assert!(thread.begin(1).is_err());
    }
}
