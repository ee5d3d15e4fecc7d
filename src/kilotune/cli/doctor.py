    "jsonschema-rs": "jsonschema_rs",
