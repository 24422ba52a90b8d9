//! Which instance is meant. To change one, the server takes an exact name or a whole id; people may type the beginning of an
//! id, which is looked up here first.

use stencil_api::client::Client;
use stencil_core::InstanceId;

use crate::failure::Failure;

/// What the server takes for the instance that was typed: the whole id of one of which only a beginning was typed.
pub(super) async fn exact(client: &Client, typed: &str) -> Result<String, Failure> {
    if is_beginning_of_an_id(typed) {
        Ok(client.get(typed).await?.id.to_string())
    } else {
        Ok(typed.to_owned())
    }
}

fn is_beginning_of_an_id(typed: &str) -> bool {
    typed.len() >= InstanceId::SHORTEST_PREFIX
        && typed.parse::<InstanceId>().is_err()
        && InstanceId::beginning_with(typed).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_beginnings_of_ids_are_looked_up() {
        for typed in ["01k9z0c8", "01k9z0c8mn000000000000000"] {
            assert!(is_beginning_of_an_id(typed), "{typed}");
        }
        for typed in [
            "01",
            "01k9z0c",
            "web",
            "warm-base-1",
            "01k9z0c8mn0000000000000009",
            "",
        ] {
            assert!(!is_beginning_of_an_id(typed), "{typed}");
        }
    }
}
