// What a signed-in user may still generate. They see the limits that bind them, and nothing else.
// In a browser it is the same: the publishable key may be public, the secret key never leaves your server.
//
//     npm ci
//     SUPABASE_URL=… SUPABASE_PUBLISHABLE_KEY=… EMAIL=… PASSWORD=… node remaining.mjs

import process from 'node:process'
import { createClient } from '@supabase/supabase-js'

/**
 * How many generations of a kind are left, to show beside the button; Infinity when unlimited.
 * In a group the tightest limit counts, and when one group has nothing left, the next one pays.
 *
 * If your groups are beneath others (customers beneath a plan), limits of several groups apply to the same generation:
 * then take the tightest of all.
 *
 * @param {import('./tokenlimits.d.ts').UserLimit[]} limits
 * @param {string} kind
 * @returns {number}
 */
function remaining(limits, kind) {
  const ofKind = limits.filter((limit) => limit.kind === kind)
  const byGroup = [...Map.groupBy(ofKind, (limit) => limit.group.id).values()]
  const perGroup = byGroup.map((those) => Math.min(...those.map((limit) => limit.remaining ?? Infinity)))
  return perGroup.reduce((sum, left) => sum + left, 0)
}

const { SUPABASE_URL = '', SUPABASE_PUBLISHABLE_KEY = '', EMAIL = '', PASSWORD = '' } = process.env

/** @type {import('@supabase/supabase-js').SupabaseClient<import('./tokenlimits.d.ts').Database>} */
const supabase = createClient(SUPABASE_URL, SUPABASE_PUBLISHABLE_KEY)

const signedIn = await supabase.auth.signInWithPassword({ email: EMAIL, password: PASSWORD })
if (signedIn.error) throw signedIn.error

const { data: limits, error } = await supabase.rpc('my_generation_usage')
if (error) throw error

for (const limit of limits) {
  const resets = limit.reset_at ? `resets ${new Date(limit.reset_at).toISOString()}` : 'never resets'
  console.log(`${limit.group.name}: ${limit.used} of ${limit.max ?? 'any number of'} ${limit.kind} used, ${resets}`)
}
for (const kind of new Set(limits.map((limit) => limit.kind))) {
  console.log(`${kind}: ${remaining(limits, kind)} left`)
}
await supabase.auth.signOut({ scope: 'local' })
