"""JSON Schemas of eight kinds, each small enough for a small model to come to an end in."""

from __future__ import annotations

from typing import Any

SCHEMAS: dict[str, Any] = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 16},
            "address": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 16},
                    "zip": {"type": "integer", "minimum": 1000, "maximum": 99999},
                },
                "required": ["city", "zip"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "address"],
        "additionalProperties": False,
    },
    "arrays with bounds": {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 10},
        "minItems": 2,
        "maxItems": 4,
    },
    "enums": {
        "type": "object",
        "properties": {
            "mood": {"enum": ["happy", "sad", "angry"]},
            "level": {"enum": [1, 2, None, True]},
        },
        "required": ["mood", "level"],
        "additionalProperties": False,
    },
    "anyOf": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"error": {"type": "string", "maxLength": 20}},
                "required": ["error"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 999}},
                "required": ["value"],
                "additionalProperties": False,
            },
        ]
    },
    "$ref": {
        "$defs": {
            "point": {
                "type": "object",
                "properties": {
                    "x": {"type": "integer", "minimum": -99, "maximum": 99},
                    "y": {"type": "integer", "minimum": -99, "maximum": 99},
                },
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "patterns": {
        "type": "object",
        "properties": {
            "plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,4}$"},
            "colour": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
        },
        "required": ["plate", "colour"],
        "additionalProperties": False,
    },
    "numbers with ranges": {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "share": {"type": "number", "enum": [0.25, 0.5, 0.75]},
            "step": {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 20},
        },
        "required": ["age", "share", "step"],
        "additionalProperties": False,
    },
    "unicode": {
        "type": "object",
        "properties": {
            "größe": {"enum": ["groß", "größer", "最大"]},
            "emoji": {"type": "string", "pattern": "^(🦊|🐢|☕)$"},
        },
        "required": ["größe", "emoji"],
        "additionalProperties": False,
    },
}
