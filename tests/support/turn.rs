//! Tests that use a GPU take turns.
//!
//! A step may wait inside for what another thread sends. A driver call of another test that waits
//! for the GPU then keeps that thread from the driver, and all of them wait for each other.

use std::sync::{Mutex, MutexGuard, PoisonError};

static GPU: Mutex<()> = Mutex::new(());

thread_local! {
    static TURN: MutexGuard<'static, ()> = GPU.lock().unwrap_or_else(PoisonError::into_inner);
}

/// Waits for the turn of this test. It lasts until the test's thread ends.
pub fn take_turn() {
    TURN.with(|_| ());
}
