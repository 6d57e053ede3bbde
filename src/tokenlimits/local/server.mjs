// Serves Supabase Lite on 127.0.0.1 for tokenlimits.local: applies the project's migrations, then answers
// HTTP, on embedded PGlite or on a PostgreSQL.
//
// It talks to its parent in JSON lines.  The first line of stdin is the configuration; each further one is
// {"sql", "parameters"}, answered in order on stdout by {"rows"} or {"error"}.  When stdin ends, the parent
// stopped or died, and this process ends too: it never outlives its parent.  stdout carries nothing else;
// whatever Lite prints goes to stderr.
//
// Where Lite answers differently from hosted Supabase (found by trying, 0.10.0), `like_hosted` puts it right:
//   1. Lite grants everything on every table beside one with row level security to anon, authenticated and
//      service_role.  Hosted projects keep the grants that the migrations made.
//   2. Lite hides most SQLSTATEs (P0001, 40P01, any of your own) behind code "SUP" and status 500.
//   3. Lite runs a stable function that is called by POST read-write.  PostgREST runs it read-only.
//   4. Lite's access tokens carry no app_metadata and no user_metadata.
//   5. Lite gives the API roles no usage on schema auth, so functions that call auth.uid() fail.
//   6. Lite writes timestamps as PostgreSQL does, not as JSON does; supabase-py can't read those of a session.
//   7. On a PostgreSQL, Lite wraps json arguments of functions in one more string.
//   8. Lite answers 500 when it can't reach the PostgreSQL, or loses it.  PostgREST answers 503.
import { createHmac } from "node:crypto";
import { createInterface } from "node:readline";
import { existsSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";

console.log = console.info = console.error;

const ROLES = "anon, authenticated, service_role";
const ROLES_SQL = `
do $$
declare role_name text;
begin
   foreach role_name in array array['anon', 'authenticated', 'service_role'] loop
      if not exists (select from pg_roles where rolname = role_name) then
         execute format('create role %I nologin %s', role_name, case role_name when 'service_role' then 'bypassrls' else '' end);
      end if;
   end loop;
end $$`;

// What PostgREST answers for a SQLSTATE, by its longest known prefix; any other gets 400.
const HTTP_STATUS = {
   "08": 503, "09": 500, "0L": 403, "0P": 403, 23505: 409, 23503: 409, 25006: 405, 25: 500, 28: 403, "2D": 500,
   38: 500, 39: 500, "3B": 500, 40: 500, 53: 503, 53400: 500, 54: 500, 55: 500, 57: 500, "57P01": 503, 58: 500,
   F0: 500, HV: 500, P0001: 400, P0: 500, XX: 500,
};
// Lite maps these itself, and as PostgREST does.
const MAPPED_BY_LITE = /^(21|22|42|PT|PGRST|55)|^(23502|23503|23505|25006)$/;
// Of Node, of postgres.js, and of a PostgreSQL that starts (57P03).
const NO_CONNECTION = /^(E[A-Z]{4,}|CONNECT(ION)?_[A-Z]+|57P03)$/;

function withSqlState(error) {
   const code = error?.code;
   if (NO_CONNECTION.test(code)) {
      const body = { code: "PGRST001", message: "Database connection error", details: error.message, hint: null };
      return { code: "PGRST", message: JSON.stringify(body), detail: JSON.stringify({ status: 503, headers: {} }) };
   }
   if (typeof code !== "string" || !/^[0-9A-Z]{5}$/.test(code) || MAPPED_BY_LITE.test(code)) return error;
   const status = HTTP_STATUS[code] ?? HTTP_STATUS[code.slice(0, 2)] ?? 400;
   const body = { code, message: error.message, details: error.detail ?? null, hint: error.hint ?? null };
   // This is how an error inside PostgreSQL sets the whole answer; Lite knows it as PostgREST does.
   return { code: "PGRST", message: JSON.stringify(body), detail: JSON.stringify({ status, headers: {} }) };
}

const qualified = ({ schema, name }) => `${schema}.${name}`;

function likeHosted(Base) {
   return class extends Base {
      #readOnly;

      async ensureRlsContext() {
         return true;
      }

      normalizeDbError(error) {
         return withSqlState(super.normalizeDbError(error));
      }

      async withContext(variables, run, options) {
         if (options?.rpc && !options.rpc.readOnly && (await this.#runsReadOnly(options.rpc))) {
            options = { ...options, rpc: { ...options.rpc, readOnly: true } };
         }
         return super.withContext(variables, run, options);
      }

      async #runsReadOnly({ path, requestHeaders }) {
         this.#readOnly ??= this.introspect({ useCache: true }).then(({ functions = [] }) => {
            const volatile = new Set(functions.filter((f) => f.volatility === "v").map(qualified));
            return new Set(functions.map(qualified).filter((name) => !volatile.has(name)));
         });
         const schema = requestHeaders?.["content-profile"] ?? "public";
         return (await this.#readOnly).has(qualified({ schema, name: path.slice("/rpc/".length) }));
      }
   };
}

const base64url = (value) => Buffer.from(value).toString("base64url");

function withClaims(token, claims, secret) {
   const [header, payload] = token.split(".");
   const merged = { ...JSON.parse(Buffer.from(payload, "base64url")), ...claims };
   const content = `${header}.${base64url(JSON.stringify(merged))}`;
   return `${content}.${createHmac("sha256", secret).update(content).digest("base64url")}`;
}

async function withMetadata(request, response, secret) {
   const path = new URL(request.url).pathname;
   if (!response.ok || !/^\/auth\/v1\/(token|signup|verify)$/.test(path)) return response;
   const body = await response.clone().json().catch(() => null);
   if (!body?.access_token || !body.user) return response;
   const { app_metadata, user_metadata, is_anonymous } = body.user;
   body.access_token = withClaims(body.access_token, { app_metadata, user_metadata, is_anonymous }, secret);
   return Response.json(body, { status: response.status, headers: response.headers });
}

// "2026-01-31 12:00:00.5+00" → "2026-01-31T12:00:00.5+00:00"
const readTimestamp = (text) => text.replace(/^(\S+) (\S+?)([+-]\d\d)?$/, (_, day, time, zone) =>
   `${day}T${time}${zone ? `${zone}:00` : ""}`);

// Lite has made JSON of some values already, and tells nobody of which.
function writeJson(value) {
   try {
      if (typeof value === "string") return JSON.parse(value), value;
   } catch {}
   return JSON.stringify(value);
}

const OID = { json: 114, timestamp: 1114, timestamptz: 1184, jsonb: 3802 };
const PGLITE_OPTIONS = {
   parsers: { [OID.timestamp]: readTimestamp, [OID.timestamptz]: readTimestamp },
   serializers: { [OID.json]: writeJson, [OID.jsonb]: writeJson },
};
const POSTGRES_TYPES = {
   json: { to: OID.json, from: [OID.json], serialize: writeJson, parse: JSON.parse },
   jsonb: { to: OID.jsonb, from: [OID.jsonb], serialize: writeJson, parse: JSON.parse },
   timestamp: { to: OID.timestamp, from: [OID.timestamp], serialize: (value) => value, parse: readTimestamp },
   timestamptz: { to: OID.timestamptz, from: [OID.timestamptz], serialize: (value) => value, parse: readTimestamp },
};

// A blank PGlite takes 4 s to make and 0.5 s to load: the first start leaves one for the others.
async function connectPglite(Connection, { blank_database: path, data_directory: url }, pgliteOptions) {
   if (url && existsSync(`${url}/PG_VERSION`)) return new Connection({ url, pgliteOptions });
   if (existsSync(path)) {
      const loadDataDir = new Blob([readFileSync(path)]);
      return new Connection({ url, pgliteOptions: { ...pgliteOptions, loadDataDir } });
   }
   const connection = new Connection({ url, pgliteOptions });
   const blank = await connection.driver.dumpDataDir("none");
   const unfinished = `${path}.${process.pid}`;
   writeFileSync(unfinished, Buffer.from(await blank.arrayBuffer()));
   renameSync(unfinished, path);
   return connection;
}

// Lite sends each statement of a migration on its own: with more than one connection they could part.
async function connect(config) {
   const adapted = config.like_hosted ? likeHosted : (Base) => Base;
   if (!config.database_url) {
      const { PgliteConnection } = await import("@supabase/lite/pglite");
      const only = await connectPglite(adapted(PgliteConnection), config, config.like_hosted ? PGLITE_OPTIONS : {});
      return { migrating: only, close: () => {}, serving: () => only };
   }
   const { PostgresConnection } = await import("@supabase/lite/postgres");
   const Connection = adapted(PostgresConnection);
   const types = config.like_hosted ? POSTGRES_TYPES : {};
   const open = (options) =>
      new Connection({ url: config.database_url, postgresOptions: { types, onnotice: () => {}, ...options } });
   const migrating = open({ max: 1 });
   const serving = (onclose) => open({ max: config.pool_size, onclose });
   return { migrating, close: () => migrating.close(), serving };
}

// postgres.js (3.4.9) writes to a connection that it has lost, from where nobody can catch the error.
process.on("uncaughtException", (error) => {
   console.error(error);
   if (!/postgres.src.connection/.test(error.stack)) process.exit(1);
});

// And it takes that connection into use again as if it were a good one, or lets its caller wait for ever: whoever loses
// one begins anew with all.
async function lasting(make) {
   const held = { current: null };
   const begin = async () => {
      let lose;
      const lost = new Promise((resolve) => (lose = resolve));
      const made = { ...(await make(lose)), waiting: new Set() };
      held.current = made;
      lost.then(() => {
         held.current = null;
         abandon(made.connection);
         for (const stopWaiting of made.waiting) stopWaiting(null);
         beginAgain();
      });
   };
   const beginAgain = () => begin().catch(() => setTimeout(beginAgain, 100));
   await begin();
   return held;
}

// The answer, or null when the connections are lost before it comes.
const unlessLost = ({ waiting }, answer) =>
   new Promise((resolve, reject) => {
      waiting.add(resolve);
      answer.then(resolve, reject).finally(() => waiting.delete(resolve));
   });

const abandon = (connection) => connection.driver.end?.({ timeout: 0 }).catch(() => {});

const RECONNECTING = "Could not query the database for the schema cache. Retrying.";
const unavailable = () =>
   Response.json({ code: "PGRST002", message: RECONNECTING, details: null, hint: null }, { status: 503 });

async function start(config) {
   const [{ App }, { applyPendingMigrations }, { serve }] = await Promise.all([
      import("@supabase/lite"),
      import("@supabase/lite/cli"),
      import("@hono/node-server"),
   ]);
   const { migrating, close, serving } = await connect(config);
   const settings = {
      api: { schemas: config.exposed_schemas },
      auth: {
         enabled: true,
         jwt_secret: config.jwt_secret,
         jwt_expiry: 3600,
         enable_signup: true,
         secret_key: config.secret_key,
         publishable_key: config.publishable_key,
         email: { enable_confirmations: false },
      },
      options: { server: { admin: false } },
   };
   const migrator = await new App({ ...settings, connection: migrating }).init();
   if (config.like_hosted) await migrating.exec(ROLES_SQL);
   await applyPendingMigrations(migrator);
   if (config.like_hosted) await migrating.exec(`grant usage on schema auth to ${ROLES}`);
   await close();
   const held = await lasting(async (onclose) => {
      const connection = serving(onclose);
      try {
         const app = await new App({ ...settings, connection }).init();
         await connection.introspect({ useCache: true });
         return { connection, app };
      } catch (error) {
         abandon(connection);
         throw error;
      }
   });
   const answer = async (request, env) => {
      const { current } = held;
      if (!current) return unavailable();
      const peerAddress = env.incoming.socket.remoteAddress ?? null;
      const response = await unlessLost(current, current.app.fetch(request, { peerAddress }));
      if (!response) return unavailable();
      return config.like_hosted ? withMetadata(request, response, config.jwt_secret) : response;
   };
   return new Promise((resolve, reject) => {
      const server = serve({ fetch: answer, hostname: "127.0.0.1", port: config.port }, ({ port }) =>
         resolve({ server, held, port }),
      );
      server.on("error", reject);
   });
}

const send = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);
const sendError = (error) =>
   send({ error: { code: error?.code ?? null, message: String(error?.message ?? error), detail: error?.detail ?? null } });

async function answerQuery({ current }, { sql, parameters }) {
   try {
      if (!current) throw new Error(RECONNECTING);
      const { driver } = current.connection;
      const rows = driver.unsafe ? await driver.unsafe(sql, parameters) : (await driver.query(sql, parameters)).rows;
      send({ rows: [...rows] });
   } catch (error) {
      sendError(error);
   }
}

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const config = JSON.parse((await lines.next()).value);
process.chdir(config.directory);
process.on("exit", () => {
   try {
      process.chdir("/");
      rmSync(config.directory, { recursive: true, force: true });
   } catch {}
});
// The end of stdin isn't noticed while the parent's own forks keep it open; a new parent is.
const parent = process.ppid;
setInterval(() => process.ppid === parent || process.exit(0), 1000).unref();

let running;
try {
   running = await start(config);
} catch (error) {
   console.error(error);
   sendError(error);
   process.exit(1);
}
send({ port: running.port });
for await (const line of lines) await answerQuery(running.held, JSON.parse(line));
// PGlite's files are whole then, and it needs no recovery at the next start
if (config.data_directory) await running.held.current?.connection.driver.close();
process.exit(0);
