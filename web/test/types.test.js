// The .d.ts files, written by hand, name what the .js and .jsx files have.
import { readFileSync } from "node:fs";
import ts from "typescript";
import { expect, test } from "vitest";
import * as client from "../AIGatewayClient.js";

const read = (name) => readFileSync(new URL(`../${name}`, import.meta.url), "utf8");
const statementsOf = (name) =>
  ts.createSourceFile(name, read(name), ts.ScriptTarget.ES2022).statements;
const exported = ({ modifiers = [] }) =>
  modifiers.some(({ kind }) => kind === ts.SyntaxKind.ExportKeyword);

/** Names of the exported values of a .d.ts file: no types, which have no value. */
const valuesOf = (statements) =>
  statements.filter(exported).flatMap((statement) => {
    if (ts.isVariableStatement(statement)) {
      return statement.declarationList.declarations.map(({ name }) => name.text);
    }
    const hasValue = ts.isClassDeclaration(statement) || ts.isFunctionDeclaration(statement);
    return hasValue ? [statement.name.text] : [];
  });

/** The member names of a class or an interface: no constructor, no computed names. */
const membersOf = (statements, type) =>
  statements.find(({ name }) => name?.text === type)
    .members.flatMap(({ name }) => (name && ts.isIdentifier(name) ? [name.text] : []));

test("the client's types name what it exports", () => {
  expect(valuesOf(statementsOf("AIGatewayClient.d.ts")).sort()).toEqual(Object.keys(client).sort());
});

test("the session's type has its methods and getters", () => {
  const declared = membersOf(statementsOf("AIGatewayClient.d.ts"), "AIGatewaySession");
  const inherited = ["addEventListener", "removeEventListener"]; // narrowed by the type
  const own = Object.getOwnPropertyNames(client.AIGatewaySession.prototype);
  const methods = own.filter((name) => name !== "constructor");
  expect(declared.sort()).toEqual([...methods, ...inherited].sort());
});

test("the error's type has its fields", () => {
  const declared = membersOf(statementsOf("AIGatewayClient.d.ts"), "AIGatewayError");
  const own = Object.getOwnPropertyNames(new client.AIGatewayError("code", "message"));
  const inherited = ["stack", "message", "cause"];
  expect(declared.sort()).toEqual(own.filter((name) => !inherited.includes(name)).sort());
});

test("the types list every code that the client itself gives", () => {
  const codes = statementsOf("AIGatewayClient.d.ts")
    .find(({ name }) => name?.text === "ClientErrorCode")
    .type.types.map(({ literal }) => literal.text);
  const source = read("AIGatewayClient.js");
  const closes = source.slice(source.indexOf("const CLOSES"), source.indexOf("};"));
  const given = [
    ...closes.matchAll(/\["(\w+)"/g),
    ...source.matchAll(/AIGatewayError\(\s*"(\w+)"/g),
    ...source.matchAll(/\? "closed" : "(\w+)"/g),
    ...source.matchAll(/\|\| "(\w+_error)"/g),
  ].map(([, code]) => code);
  expect(codes).toEqual([...new Set(given)].sort());
});

test("the component's types name its properties", () => {
  const declared = membersOf(statementsOf("AIGatewayChat.d.ts"), "AIGatewayChatProps");
  const taken = ["AIGatewayChat", "useConversation"].flatMap((name) =>
    statementsOf("AIGatewayChat.jsx")
      .find((statement) => ts.isFunctionDeclaration(statement) && statement.name.text === name)
      .parameters[0].name.elements.filter((element) => !element.dotDotDotToken)
      .map(({ name: local, propertyName }) => (propertyName ?? local).text));
  expect(declared.sort()).toEqual(taken.sort());
});
