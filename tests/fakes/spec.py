"""Checks requests and answers against a published OpenAPI document (version 2 or 3, what the two of them use of it)."""

import json
import re

TYPES = {
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


class Spec:
    def __init__(self, path):
        with open(path, encoding="utf-8") as f:
            self.document = json.load(f)
        servers = self.document.get("servers")
        self.base = re.sub(r"^https?://[^/]*", "", servers[0]["url"]) if servers else ""
        self.routes = []
        for template, item in self.document["paths"].items():
            names = re.findall(r"{(\w+)}", template)
            pattern = re.compile("^" + re.sub(r"{\w+}", r"([^/]+)", self.base + template) + "$")
            self.routes.append((pattern, names, template, item))

    def resolve(self, schema):
        while "$ref" in schema:
            node = self.document
            for part in schema["$ref"].lstrip("#/").split("/"):
                node = node[part]
            schema = node
        return schema

    def operation(self, method, path):
        """The operation, its template and the parts of the path that have names; or None."""
        for pattern, names, template, item in self.routes:
            found = pattern.match(path)
            if found and method.lower() in item:
                return item[method.lower()], template, dict(zip(names, found.groups()))
        return None

    def body_schema(self, operation):
        """The schema of what has to be sent, and whether it has to be; (None, False) if nothing is."""
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "body":
                return parameter["schema"], parameter.get("required", False)
        body = operation.get("requestBody")
        if body:
            return body["content"]["application/json"]["schema"], body.get("required", False)
        return None, False

    def problems(self, value, schema, where="body"):
        schema = self.resolve(schema)
        kind = schema.get("type", "object" if "properties" in schema else None)
        if kind and not TYPES[kind](value):
            return [f"{where} is {value!r}, which is no {kind}"]
        found = []
        if "enum" in schema and value not in schema["enum"]:
            found.append(f"{where} is {value!r}, which is none of {schema['enum']}")
        if "minimum" in schema and value < schema["minimum"]:
            found.append(f"{where} is {value}, which is less than {schema['minimum']}")
        if "maximum" in schema and value > schema["maximum"]:
            found.append(f"{where} is {value}, which is more than {schema['maximum']}")
        if kind == "array":
            for i, item in enumerate(value):
                found += self.problems(item, schema.get("items", {}), f"{where}[{i}]")
        if kind == "object":
            properties = schema.get("properties", {})
            found += [f"{where} has no {name}" for name in schema.get("required", []) if name not in value]
            for name, item in value.items():
                if name in properties:
                    found += self.problems(item, properties[name], f"{where}.{name}")
                elif "additionalProperties" not in schema:
                    found.append(f"{where} has a field {name}, which the specification does not know")
        return found

    def check_request(self, method, path, body):
        """What is wrong with it, in words. `body` is bytes."""
        found = self.operation(method, path)
        if not found:
            return [f"there is no {method} {path}"]
        operation, _, parts = found
        schema, required = self.body_schema(operation)
        if schema is None:
            return [f"{method} {path} takes no body, and has {body[:80]!r}"] if body else []
        if not body:
            return [f"{method} {path} has no body"] if required else []
        try:
            value = json.loads(body)
        except ValueError as error:
            return [f"{method} {path}: {error}"]
        problems = [f"{method} {path}: {problem}" for problem in self.problems(value, schema)]
        for name, part in parts.items():
            if isinstance(value, dict) and value.get(name) != part:
                problems.append(f"{method} {path}: {name} is {value.get(name)!r} in the body")
        return problems

    def check_answer(self, method, path, status, value):
        """The fake's own answer: is it one that the real one could give? A status that is not named is an error's."""
        operation, _, _ = self.operation(method, path)
        responses = {str(code): response for code, response in operation["responses"].items()}
        response = responses.get(str(status), responses.get("default"))
        if response is None:
            return [] if status >= 400 else [f"{method} {path} is never answered with {status}"]
        schema = response.get("schema") or response.get("content", {}).get("application/json", {}).get("schema")
        if schema is None or value is None:
            return [] if schema is None and value is None or status >= 400 else [f"{method} {path}: body of {status}"]
        return [f"answer to {method} {path}: {problem}" for problem in self.problems(value, schema)]
