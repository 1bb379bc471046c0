//! Prefetching: the next item of an iterator is produced on another thread while the current one is used.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, Builder};

use crate::{Error, ErrorKind, Result};

/// Capacity of the queue of finished items. One more may be in production.
const QUEUE_CAPACITY: usize = 1;

/// An item, or the panic of the iterator.
type Produced<T> = Result<T, Box<dyn Any + Send>>;

/// The prefetched items, in order.
pub(crate) struct Prefetched<T> {
    receiver: Receiver<Produced<T>>,
}

/// Calls `consume` with the items of an iterator that runs ahead of it on another thread.
///
/// The items have the iterator's order and number. If the iterator panics, the panic is resumed in the
/// consumer when it requests that item. When `consume` returns or panics, the thread finishes the current
/// item and drops the iterator before this function returns.
///
/// # Errors
/// Those of `consume`; [`ErrorKind::Backend`] if no thread can be started.
pub(crate) fn prefetch<T: Send, R>(
    items: impl Iterator<Item = T> + Send,
    consume: impl FnOnce(&mut Prefetched<T>) -> Result<R>,
) -> Result<R> {
    thread::scope(|scope| {
        let (sender, receiver) = sync_channel(QUEUE_CAPACITY);
        Builder::new()
            .name("llara-prefetch".into())
            .spawn_scoped(scope, move || produce(items, &sender))
            .map_err(|e| {
                Error::new(ErrorKind::Backend, "cannot start a thread for the next batch")
                    .because(e)
                    .hint("raise the limit on threads or processes (ulimit -u)")
            })?;
        // The receiver is dropped at the end of `consume`, which ends a blocked send of the thread.
        consume(&mut Prefetched { receiver })
    })
}

/// Produces items until the iterator ends or panics, or the receiver is dropped.
fn produce<T>(mut items: impl Iterator<Item = T>, sender: &SyncSender<Produced<T>>) {
    loop {
        // Unwind safety: after a panic the iterator is not used again.
        let item = match catch_unwind(AssertUnwindSafe(|| items.next())) {
            Ok(None) => return,
            Ok(Some(item)) => Ok(item),
            Err(panic) => Err(panic),
        };
        let last = item.is_err();
        if sender.send(item).is_err() || last {
            return;
        }
    }
}

impl<T> Iterator for Prefetched<T> {
    type Item = T;

    /// Waits for the next item.
    ///
    /// # Panics
    /// Resumes a panic of the iterator.
    fn next(&mut self) -> Option<T> {
        // The thread closes the channel at the end of the items.
        self.receiver.recv().ok()?.map_or_else(|panic| resume_unwind(panic), Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn items_come_in_order_up_to_where_the_loop_stops(count in 0usize..30, taken in 0usize..40) {
            let asked = AtomicUsize::new(0);
            let items = (0..count).inspect(|_| { asked.fetch_add(1, Ordering::SeqCst); });
            let got: Vec<usize> =
                prefetch(items, |items| Ok(items.take(taken).collect())).unwrap();
            prop_assert_eq!(got, (0..count.min(taken)).collect::<Vec<_>>());
            prop_assert!(asked.into_inner() <= taken + QUEUE_CAPACITY + 1);
        }
    }

    #[test]
    fn the_next_item_is_produced_during_the_loop() {
        // Blocks forever if an item is only produced on request.
        let (begun, seen) = std::sync::mpsc::channel();
        let items = (0..4).inspect(move |&i| begun.send(i).unwrap());
        prefetch(items, |items| {
            for item in items {
                if item < 3 {
                    while seen.recv().unwrap() != item + 1 {}
                }
            }
            Ok(())
        })
        .unwrap();
    }

    /// An iterator of 0, 1 and a panic.
    fn breaking() -> impl Iterator<Item = i32> + Send {
        (0..9).map(|i| if i < 2 { i } else { panic!("item {i} is broken") })
    }

    #[test]
    fn a_panic_is_resumed_at_its_item() {
        let mut seen = Vec::new();
        let run = AssertUnwindSafe(|| {
            prefetch(breaking(), |items| {
                seen.extend(items);
                Ok(())
            })
        });
        let panic = catch_unwind(run).unwrap_err();
        assert_eq!(panic.downcast_ref::<String>().unwrap(), "item 2 is broken");
        assert_eq!(seen, [0, 1]);
    }

    #[test]
    fn an_error_of_the_loop_is_not_hidden_by_a_later_panic() {
        let failed: Result<()> = prefetch(breaking(), |items| {
            let first = items.next();
            // Time for the panic, which must not affect the loop.
            thread::sleep(std::time::Duration::from_millis(20));
            Err(Error::new(ErrorKind::Numeric, format!("diverged at {first:?}")))
        });
        assert!(failed.unwrap_err().to_string().contains("diverged at Some(0)"));
    }
}
