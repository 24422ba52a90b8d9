//! The way to the agent in a guest of Cloud Hypervisor.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use stencil_core::MemoryMode;
use stencil_vmm::{Hypervisor, VmmError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::cloud_hypervisor::World;

#[tokio::test]
async fn the_agent_of_a_vm_and_of_each_fork_is_reached() {
    let world = World::new();
    let template = world.snapshot().await;
    let mut processes = Vec::new();
    for name in ["fork-1", "fork-2"] {
        let dir = world.instance(name);
        processes.push(world.spawn(&dir).await);
        world.restore(&dir, &template, MemoryMode::Cow).await.unwrap();
        let mut agent = world.vmm.connect_agent(&dir).await.unwrap();
        agent.write_all(name.as_bytes()).await.unwrap();
        let mut heard = vec![0; "hello".len() + name.len()];
        agent.read_exact(&mut heard).await.unwrap();
        assert_eq!(
            heard,
            [b"hello", name.as_bytes()].concat(),
            "nothing of it is lost"
        );
    }
}

/// The error of a VMM that answers with these bytes and hangs up, or does not answer at all.
async fn error_where(answer: Option<&'static [u8]>) -> String {
    let world = World::new();
    let dir = world.instance("vm");
    let listener = UnixListener::bind(dir.vsock_socket()).unwrap();
    let vmm = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        connection.read_exact(&mut [0; 13]).unwrap();
        if let Some(answer) = answer {
            connection.write_all(answer).unwrap();
        } else {
            // Until the other side has given up.
            assert_eq!(connection.read(&mut [0]).unwrap(), 0);
        }
    });
    let error = world.vmm.connect_agent(&dir).await.unwrap_err();
    vmm.join().unwrap();
    match error {
        VmmError::Agent { source, .. } => source.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_no_way_to_an_agent_is_told_in_time() {
    assert_eq!(
        error_where(Some(b"")).await,
        "nobody in the guest listens on vsock port 1024"
    );
    assert_eq!(error_where(Some(b"NO\n")).await, "the VMM answered \"NO\\n\"");
    assert_eq!(error_where(Some(b"OK 107")).await, "the VMM answered \"OK 107\"");
    let endless: &[u8] = &[b'O'; 64];
    assert_eq!(
        error_where(Some(endless)).await,
        format!("the VMM answered {:?}", "O".repeat(32))
    );
    assert_eq!(
        error_where(None).await,
        "nobody in the guest answered on vsock port 1024 within 2s"
    );
    let world = World::new();
    let error = world.vmm.connect_agent(&world.instance("vm")).await.unwrap_err();
    assert!(
        matches!(&error, VmmError::Agent { source, .. } if source.kind() == std::io::ErrorKind::NotFound),
        "{error:?}"
    );
}
