"""Flows take an address of an object store as a parameter, and Prefect records it as text."""

from prefect.utilities.callables import parameter_schema

from featcache.storage import StoreUrl
from flows.extract import extract_features
from flows.train_heads import train_heads


def test_parameters_and_records() -> None:
    values = {"cache": "s3://bucket/birds", "heads": [{"head": {"kind": "linear"}}]}
    parameters = train_heads.validate_parameters(values)
    assert isinstance(parameters["cache"], StoreUrl)
    recorded = train_heads.serialize_parameters(parameters)
    assert recorded["cache"] == "s3://bucket/birds"
    assert train_heads.validate_parameters(recorded)["cache"] == parameters["cache"]
    schema = parameter_schema(train_heads).model_dump()["properties"]["cache"]
    assert schema["type"] == "string"
    config = {"dataset": {"kind": "folder", "root": "data"}, "cache": "s3://bucket/birds"}
    extract = extract_features.validate_parameters({"config": config})["config"]
    assert str(extract.cache) == "s3://bucket/birds"
    assert extract.record()["cache"] == "s3://bucket/birds"
