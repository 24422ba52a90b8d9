//! The 16550 serial port, with as much input waiting as clients send.
//!
//! The UART's FIFO holds 64 bytes. What does not fit waits in a queue and follows as the guest reads, so that no input
//! is lost; both are part of the saved state.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use vm_superio::serial::{Error as UartError, NoEvents, SerialState as UartState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Output;
use crate::counters::Counters;
use crate::locked::locked;

/// Its interrupt line: COM1's.
pub(crate) const GSI: u32 = 4;

/// Input that may wait; above it clients have to.
const WAITING_MAX: usize = 64 << 10;

/// The offset of the data register.
const DATA: u8 = 0;

/// The serial port.
pub(crate) struct Serial {
    port: Mutex<Port>,
    counters: Arc<Counters>,
    room: Arc<Notify>,
}

struct Port {
    uart: Uart<InterruptLine, NoEvents, Output>,
    waiting: VecDeque<u8>,
}

/// The serial port's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialState {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    #[serde(with = "hex")]
    fifo: Vec<u8>,
    /// Input that has not reached the FIFO.
    #[serde(with = "hex")]
    waiting: Vec<u8>,
}

/// The serial port cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SerialError {
    #[error("the saved FIFO of the serial port has {0} bytes, more than a 16550 holds")]
    Fifo(usize),
    #[error("the serial port's interrupt cannot be raised")]
    Interrupt(#[source] io::Error),
}

impl Serial {
    /// A port as it is after power-on.
    pub(crate) fn new(line: EventFd, output: Output, counters: Arc<Counters>) -> Result<Self, SerialError> {
        Self::build(&UartState::default(), VecDeque::new(), line, output, counters)
    }

    /// A port as it was saved; an interrupt that was pending is raised again.
    pub(crate) fn restore(
        state: &SerialState,
        line: EventFd,
        output: Output,
        counters: Arc<Counters>,
    ) -> Result<Self, SerialError> {
        Self::build(
            &state.uart(),
            state.waiting.clone().into(),
            line,
            output,
            counters,
        )
    }

    fn build(
        state: &UartState,
        waiting: VecDeque<u8>,
        line: EventFd,
        output: Output,
        counters: Arc<Counters>,
    ) -> Result<Self, SerialError> {
        let uart =
            Uart::from_state(state, InterruptLine(line), NoEvents, output).map_err(|error| match error {
                UartError::Trigger(error) | UartError::IOError(error) => SerialError::Interrupt(error),
                UartError::FullFifo => SerialError::Fifo(state.in_buffer.len()),
            })?;
        Ok(Self {
            port: Mutex::new(Port { uart, waiting }),
            counters,
            room: Arc::default(),
        })
    }

    /// The guest reads the register at `offset` from the port's base.
    pub(crate) fn read(&self, offset: u8) -> u8 {
        let mut port = locked(&self.port);
        let value = port.uart.read(offset);
        if offset == DATA {
            port.refill();
            if port.waiting.len() < WAITING_MAX {
                self.room.notify_waiters();
            }
        }
        value
    }

    /// The guest writes the register at `offset` from the port's base.
    pub(crate) fn write(&self, offset: u8, value: u8) {
        let mut port = locked(&self.port);
        if let Err(error) = port.uart.write(offset, value) {
            tracing::warn!(%error, "output of the serial port is lost");
        }
        // It may have left loopback mode, which takes no input.
        port.refill();
    }

    /// Takes input for the guest, unless too much waits already; says whether it did.
    pub(crate) fn try_input(&self, bytes: &[u8]) -> bool {
        let mut port = locked(&self.port);
        if port.waiting.len() >= WAITING_MAX {
            return false;
        }
        port.waiting.extend(bytes);
        port.refill();
        self.counters.serial_in.fetch_add(bytes.len() as u64, Relaxed);
        true
    }

    /// Notified when there is room for input again, and when the port is no more.
    pub(crate) fn room(&self) -> Arc<Notify> {
        Arc::clone(&self.room)
    }

    /// Raises its interrupt if one is pending: for interrupt controllers that were set since it was raised.
    pub(crate) fn raise_again(&self) -> Result<(), SerialError> {
        let port = locked(&self.port);
        // Bit 0 of the interrupt identification: none is pending.
        if port.uart.state().interrupt_identification & 1 == 0 {
            let line = port.uart.interrupt_evt();
            line.trigger().map_err(SerialError::Interrupt)?;
        }
        Ok(())
    }

    pub(crate) fn save(&self) -> SerialState {
        let port = locked(&self.port);
        SerialState::of(port.uart.state(), port.waiting.iter().copied().collect())
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.room.notify_waiters();
    }
}

impl Port {
    /// Moves waiting input into an empty FIFO, which raises the interrupt where the guest wants it.
    fn refill(&mut self) {
        let (chunk, _) = self.waiting.as_slices();
        if chunk.is_empty() || self.uart.fifo_capacity() < FIFO {
            return;
        }
        match self.uart.enqueue_raw_bytes(chunk) {
            Ok(taken) => drop(self.waiting.drain(..taken)),
            Err(error) => tracing::error!(%error, "the serial port's interrupt cannot be raised"),
        }
    }
}

/// Bytes that the FIFO of vm-superio holds.
const FIFO: usize = 64;

struct InterruptLine(EventFd);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialState {
    fn of(uart: UartState, waiting: Vec<u8>) -> Self {
        Self {
            divisor_low: uart.baud_divisor_low,
            divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            waiting,
        }
    }

    fn uart(&self) -> UartState {
        UartState {
            baud_divisor_low: self.divisor_low,
            baud_divisor_high: self.divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.fifo.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters() -> Arc<Counters> {
        Arc::new(Counters::new(1))
    }

    fn line() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    fn serial() -> Serial {
        Serial::new(line(), Output::nowhere(counters()), counters()).unwrap()
    }

    fn read_all(serial: &Serial) -> Vec<u8> {
        let mut read = Vec::new();
        // Line status, bit 0: there is data.
        while serial.read(5) & 1 != 0 {
            read.push(serial.read(DATA));
        }
        read
    }

    #[test]
    fn input_larger_than_the_fifo_arrives_whole() {
        let serial = serial();
        let sent: Vec<u8> = (0..=255).cycle().take(5000).collect();
        assert!(serial.try_input(&sent));
        assert_eq!(read_all(&serial), sent);
    }

    #[test]
    fn pending_input_survives_save_and_restore() {
        let before = serial();
        let sent = [7_u8; 300];
        assert!(before.try_input(&sent));
        before.read(DATA);
        let state = before.save();
        let text = serde_json::to_string(&state).unwrap();
        let state: SerialState = serde_json::from_str(&text).unwrap();
        let after = Serial::restore(&state, line(), Output::nowhere(counters()), counters()).unwrap();
        assert_eq!(read_all(&after).len(), 299);
    }

    #[test]
    fn too_much_input_has_to_wait() {
        let serial = serial();
        assert!(serial.try_input(&vec![0; WAITING_MAX + FIFO]));
        assert!(!serial.try_input(b"x"));
        // A FIFO's worth has to be read before the queue moves.
        for _ in 0..=FIFO {
            serial.read(DATA);
        }
        assert!(serial.try_input(b"x"));
    }

    #[test]
    fn input_raises_the_interrupt_when_the_guest_wants_it() {
        let event = line();
        let serial = Serial::new(
            event.try_clone().unwrap(),
            Output::nowhere(counters()),
            counters(),
        )
        .unwrap();
        assert!(serial.try_input(b"a"));
        assert!(event.read().is_err(), "interrupts are not enabled");
        serial.write(1, 1);
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn a_state_with_an_impossible_fifo_is_refused() {
        let state = SerialState {
            fifo: vec![0; 65],
            ..Default::default()
        };
        let result = Serial::restore(&state, line(), Output::nowhere(counters()), counters());
        assert!(matches!(result, Err(SerialError::Fifo(65))));
    }
}
