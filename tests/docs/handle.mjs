// Sends requests to the handler of a recipe, a Next.js route or an Edge Function, without a server.
//     node handle.mjs FILE < requests.json
import { registerHooks } from 'node:module'
import { pathToFileURL } from 'node:url'
import { text } from 'node:stream/consumers'
import process from 'node:process'

// as Deno does
registerHooks({
  resolve: (name, context, next) => next(name.replace(/^npm:(@?[^@]+)@.*$/, '$1'), context),
})
let served
globalThis.Deno = { env: { get: (name) => process.env[name] }, serve: (handler) => (served = handler) }

const { POST } = await import(pathToFileURL(process.argv[2]))
const handler = served ?? POST
const answers = []
for (const { headers, body } of JSON.parse(await text(process.stdin))) {
  const request = new Request('http://localhost/', { method: 'POST', headers, body: JSON.stringify(body) })
  const response = await handler(request)
  answers.push({ status: response.status, headers: Object.fromEntries(response.headers), body: await response.json() })
}
console.log(JSON.stringify(answers))
