-- The rows that a program wrote into the journal's database before states had a form and before the cancellation of an
-- order had a reason, on the tables of its migrations 1 to 3. Never change them: they stand for what is stored.

update journal_head set (position, journal) = (35, 'ec420e8b-a8ee-41b7-9b07-2a14ac0b4c6b');

create table migrations (version integer primary key, applied_at timestamptz not null default now());
insert into migrations (version) values (1), (2), (3);

insert into events (position, aggregate, id, version, type, schema, payload, at, actor, command_id) values
(1, 'user', '01800000-0000-7000-8000-000000000001', 1, 'registered', 1, '{"email":"Hopper@Example.com","name":"Grace Hopper","country":"United States"}', '2026-11-28 15:59:10.305Z', 'sign-up', NULL),
(2, 'user', '01800000-0000-7000-8000-000000000002', 1, 'registered', 1, '{"email":"bob@example.com","name":"Bob","country":null}', '2026-11-28 15:59:10.35Z', NULL, NULL),
(3, 'user', '01800000-0000-7000-8000-000000000001', 2, 'updated', 1, '{"email":"hopper@example.com","name":"Rear Admiral Hopper","country":"United States"}', '2026-11-28 15:59:10.465Z', NULL, NULL),
(4, 'user', '01800000-0000-7000-8000-000000000002', 2, 'deleted', 1, '{}', '2026-11-28 15:59:10.552Z', NULL, NULL),
(5, 'product', '01800000-0000-7000-8000-000000000011', 1, 'created', 1, '{"sku":"LAMP-7","name":"Brass desk lamp","price":{"amount":3750,"currency":"USD"},"stock":20}', '2026-11-28 15:59:10.622Z', NULL, NULL),
(6, 'product', '01800000-0000-7000-8000-000000000012', 1, 'created', 1, '{"sku":"É1","name":"Abat-jour","price":{"amount":900,"currency":"EUR"},"stock":0}', '2026-11-28 15:59:10.684Z', NULL, NULL),
(7, 'product', '01800000-0000-7000-8000-000000000012', 2, 'restocked', 1, '{"quantity":8,"stock":8}', '2026-11-28 15:59:10.712Z', NULL, NULL),
(8, 'product', '01800000-0000-7000-8000-000000000012', 3, 'updated', 1, '{"sku":"É1","name":"Abat-jour","price":{"amount":950,"currency":"EUR"}}', '2026-11-28 15:59:10.775Z', NULL, NULL),
(9, 'product', '01800000-0000-7000-8000-000000000013', 1, 'created', 1, '{"sku":"OLD","name":"Oil lamp","price":{"amount":1,"currency":"USD"},"stock":1}', '2026-11-28 15:59:10.796Z', NULL, NULL),
(10, 'product', '01800000-0000-7000-8000-000000000013', 2, 'deleted', 1, '{}', '2026-11-28 15:59:10.877Z', NULL, NULL),
(11, 'order', '01800000-0000-7000-8000-000000000021', 1, 'placed', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}', '2026-11-28 15:59:10.945Z', NULL, NULL),
(12, 'product', '01800000-0000-7000-8000-000000000011', 2, 'stock_taken', 1, '{"order":"01800000-0000-7000-8000-000000000021","quantity":2,"stock":18}', '2026-11-28 15:59:10.945Z', NULL, NULL),
(13, 'order', '01800000-0000-7000-8000-000000000022', 1, 'placed', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}', '2026-11-28 15:59:11Z', NULL, NULL),
(14, 'product', '01800000-0000-7000-8000-000000000011', 3, 'stock_taken', 1, '{"order":"01800000-0000-7000-8000-000000000022","quantity":2,"stock":16}', '2026-11-28 15:59:11Z', NULL, NULL),
(15, 'order', '01800000-0000-7000-8000-000000000023', 1, 'placed', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}', '2026-11-28 15:59:11.016Z', NULL, NULL),
(16, 'product', '01800000-0000-7000-8000-000000000011', 4, 'stock_taken', 1, '{"order":"01800000-0000-7000-8000-000000000023","quantity":2,"stock":14}', '2026-11-28 15:59:11.016Z', NULL, NULL),
(17, 'order', '01800000-0000-7000-8000-000000000024', 1, 'placed', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}', '2026-11-28 15:59:11.079Z', NULL, NULL),
(18, 'product', '01800000-0000-7000-8000-000000000011', 5, 'stock_taken', 1, '{"order":"01800000-0000-7000-8000-000000000024","quantity":2,"stock":12}', '2026-11-28 15:59:11.079Z', NULL, NULL),
(19, 'order', '01800000-0000-7000-8000-000000000025', 1, 'placed', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}', '2026-11-28 15:59:11.178Z', NULL, NULL),
(20, 'product', '01800000-0000-7000-8000-000000000011', 6, 'stock_taken', 1, '{"order":"01800000-0000-7000-8000-000000000025","quantity":2,"stock":10}', '2026-11-28 15:59:11.178Z', NULL, NULL),
(21, 'order', '01800000-0000-7000-8000-000000000026', 1, 'placed', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}', '2026-11-28 15:59:11.269Z', NULL, NULL),
(22, 'product', '01800000-0000-7000-8000-000000000011', 7, 'stock_taken', 1, '{"order":"01800000-0000-7000-8000-000000000026","quantity":2,"stock":8}', '2026-11-28 15:59:11.269Z', NULL, NULL),
(23, 'order', '01800000-0000-7000-8000-000000000027', 1, 'placed', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-11-28T15:59:11.375Z","lines":[{"product":"01800000-0000-7000-8000-000000000012","sku":"É1","name":"Abat-jour","quantity":3,"unit_price":{"amount":950,"currency":"EUR"}},{"product":"01800000-0000-7000-8000-000000000012","sku":"É1","name":"Abat-jour","quantity":1,"unit_price":{"amount":800,"currency":"EUR"}}],"total":{"amount":3650,"currency":"EUR"}}', '2026-11-28 15:59:11.375Z', NULL, NULL),
(24, 'product', '01800000-0000-7000-8000-000000000012', 4, 'stock_taken', 1, '{"order":"01800000-0000-7000-8000-000000000027","quantity":4,"stock":4}', '2026-11-28 15:59:11.375Z', NULL, NULL),
(25, 'order', '01800000-0000-7000-8000-000000000022', 2, 'paid', 1, '{}', '2026-11-28 15:59:11.449Z', NULL, NULL),
(26, 'order', '01800000-0000-7000-8000-000000000023', 2, 'paid', 1, '{}', '2026-11-28 15:59:11.518Z', NULL, NULL),
(27, 'order', '01800000-0000-7000-8000-000000000025', 2, 'paid', 1, '{}', '2026-11-28 15:59:11.57Z', NULL, NULL),
(28, 'order', '01800000-0000-7000-8000-000000000023', 3, 'shipped', 1, '{}', '2026-11-28 15:59:11.675Z', NULL, NULL),
(29, 'order', '01800000-0000-7000-8000-000000000024', 2, 'cancelled', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"},"refund_due":false}', '2026-11-28 15:59:11.706Z', NULL, NULL),
(30, 'product', '01800000-0000-7000-8000-000000000011', 8, 'stock_returned', 1, '{"order":"01800000-0000-7000-8000-000000000024","quantity":2,"stock":10}', '2026-11-28 15:59:11.706Z', NULL, NULL),
(31, 'order', '01800000-0000-7000-8000-000000000025', 3, 'cancelled', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"},"refund_due":true}', '2026-11-28 15:59:11.803Z', NULL, NULL),
(32, 'product', '01800000-0000-7000-8000-000000000011', 9, 'stock_returned', 1, '{"order":"01800000-0000-7000-8000-000000000025","quantity":2,"stock":12}', '2026-11-28 15:59:11.803Z', NULL, NULL),
(33, 'order', '01800000-0000-7000-8000-000000000026', 2, 'cancelled', 1, '{"user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"},"refund_due":false}', '2026-11-28 15:59:11.854Z', NULL, NULL),
(34, 'product', '01800000-0000-7000-8000-000000000011', 10, 'stock_returned', 1, '{"order":"01800000-0000-7000-8000-000000000026","quantity":2,"stock":14}', '2026-11-28 15:59:11.854Z', NULL, NULL),
(35, 'order', '01800000-0000-7000-8000-000000000026', 3, 'deleted', 1, '{}', '2026-11-28 15:59:11.922Z', NULL, NULL);

insert into aggregates (id, kind, version, state) values
('01800000-0000-7000-8000-000000000001', 'user', 2, '{"status":"living","email":"hopper@example.com","name":"Rear Admiral Hopper","country":"United States"}'),
('01800000-0000-7000-8000-000000000002', 'user', 2, '{"status":"deleted"}'),
('01800000-0000-7000-8000-000000000011', 'product', 10, '{"status":"living","sku":"LAMP-7","name":"Brass desk lamp","price":{"amount":3750,"currency":"USD"},"stock":14}'),
('01800000-0000-7000-8000-000000000012', 'product', 4, '{"status":"living","sku":"É1","name":"Abat-jour","price":{"amount":950,"currency":"EUR"},"stock":4}'),
('01800000-0000-7000-8000-000000000013', 'product', 2, '{"status":"deleted"}'),
('01800000-0000-7000-8000-000000000021', 'order', 1, '{"status":"placed","user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}'),
('01800000-0000-7000-8000-000000000022', 'order', 2, '{"status":"paid","user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-01-31T09:30:00.000Z","lines":[{"product":"01800000-0000-7000-8000-000000000011","sku":"LAMP-7","name":"Brass desk lamp","quantity":2,"unit_price":{"amount":3750,"currency":"USD"}}],"total":{"amount":7500,"currency":"USD"}}'),
('01800000-0000-7000-8000-000000000023', 'order', 3, '{"status":"shipped"}'),
('01800000-0000-7000-8000-000000000024', 'order', 2, '{"status":"cancelled"}'),
('01800000-0000-7000-8000-000000000025', 'order', 3, '{"status":"cancelled"}'),
('01800000-0000-7000-8000-000000000026', 'order', 3, '{"status":"deleted"}'),
('01800000-0000-7000-8000-000000000027', 'order', 1, '{"status":"placed","user":"01800000-0000-7000-8000-000000000001","placed_at":"2026-11-28T15:59:11.375Z","lines":[{"product":"01800000-0000-7000-8000-000000000012","sku":"É1","name":"Abat-jour","quantity":3,"unit_price":{"amount":950,"currency":"EUR"}},{"product":"01800000-0000-7000-8000-000000000012","sku":"É1","name":"Abat-jour","quantity":1,"unit_price":{"amount":800,"currency":"EUR"}}],"total":{"amount":3650,"currency":"EUR"}}');

insert into claims (scope, value, id) values
('product.sku', 'LAMP-7', '01800000-0000-7000-8000-000000000011'),
('product.sku', 'É1', '01800000-0000-7000-8000-000000000012'),
('user.email', 'hopper@example.com', '01800000-0000-7000-8000-000000000001');
